"""transformers' processor of Qwen2.5-VL without videos, whose part of it would need torchvision.

`transformers_server.py` saves it beside a model; transformers reads it from there (`--trust-remote-code`).
"""

from transformers import ProcessorMixin, Qwen2_5_VLProcessor


class PictureProcessor(Qwen2_5_VLProcessor):
    """Messages with pictures to tokens and patches."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id, self.video_token_id = map(
            tokenizer.convert_tokens_to_ids, (self.image_token, self.video_token)
        )
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)
