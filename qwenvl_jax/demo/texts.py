"""Every word of the page, in English and in Chinese."""

import dataclasses
from collections.abc import Mapping

from qwenvl_jax.demo.client import Answer, AskError


@dataclasses.dataclass(frozen=True)
class Texts:
    """One language. `errors` has a sentence for each `AskError.kind`, with its details in braces."""

    language: str  # as HTML's lang
    title: str
    hint: str
    other: str  # language, in its own words
    other_path: str
    loading: str
    ready: str
    chat: str
    question: str
    placeholder: str
    empty: str
    examples: Mapping[str, tuple[str, str]]  # kind: title of the card, question
    more_pictures: str
    camera: str
    add_camera: str
    address: str
    address_hint: str
    add_address: str
    settings: str
    settings_hint: str
    own: str  # value of the model
    numbers: Mapping[str, str]
    system: str
    detail: str
    details: Mapping[str, str]
    schema: str
    schema_hint: str
    reset: str
    code: str
    no_code: str
    curl: str
    python: str
    status: str
    usage: str
    tokens_only: str
    first: str
    rate: str
    finish: Mapping[str, str]
    request: str
    stopped: str
    broken: str
    write_a_question: str
    too_many_pictures: str
    inside: str
    errors: Mapping[str, str]
    footer: str

    def error(self, error: AskError) -> str:
        """What the page says of an error."""
        details = error.details
        if error.kind == "number":
            details = details | {"name": self.numbers[details["name"]]}
        return self.errors[error.kind].format(**details)

    def summary(self, answer: Answer, cut: str) -> str:
        """The line about a reply: tokens, times, why it ended and the request's id. cut: why it is not whole, or ""."""
        said = []
        if answer.picture_tokens is not None and answer.prompt_tokens is not None:
            text = answer.prompt_tokens - answer.picture_tokens
            said.append(self.usage.format(pictures=answer.picture_tokens, text=text, tokens=answer.tokens))
        elif answer.prompt_tokens is not None:
            said.append(self.tokens_only.format(prompt=answer.prompt_tokens, tokens=answer.tokens))
        if answer.first is not None and answer.last is not None:
            pieces = (answer.tokens or 1) - 1
            seconds = answer.last - answer.first
            said.append(self.first.format(seconds=answer.first))
            if pieces > 0 and seconds > 0:
                said.append(self.rate.format(rate=pieces / seconds))
        said.append(cut or self.finish.get(answer.finish or "", answer.finish or ""))
        if answer.request_id:
            said.append(self.request.format(id=answer.request_id))
        return " · ".join(said)


EN = Texts(
    language="en",
    title="Qwen-VL in JAX",
    hint="Add pictures, ask about them, and see where the answer points. The model may be wrong.",
    other="中文",
    other_path="/zh",
    loading="loading the model …",
    ready="{name} is ready",
    chat="Conversation",
    question="Question",
    placeholder="Ask about a picture: type, paste or drop it here …",
    empty="**What do you want to know?**\n\nAdd a picture below, or take one of these.",
    examples={
        "caption": ("Describe", "What is in the picture?"),
        "question": ("Ask", "What color is the cross?"),
        "reading": ("Read", "What number is written in the picture?"),
        "counting": ("Count", "How many objects are there?"),
        "grounding": ("Find", "Where is the yellow cross?"),
        "inside": ("Look inside a box", "What is in <box>(745,311),(936,621)</box>?"),
        "pictures": ("Two pictures", "What is written in Picture 2?"),
        "chinese": ("In Chinese", "图中有什么？"),
        "json": ("Answer as JSON", "What is in the picture?"),
    },
    more_pictures="Picture from camera or web address",
    camera="Camera",
    add_camera="Add the photo to the question",
    address="Web address of a picture",
    address_hint="https://…",
    add_address="Add it to the question",
    settings="Settings",
    settings_hint="What is empty is left to the model.",
    own="model: {value}",
    numbers={
        "temperature": "Temperature (0: always the likeliest)",
        "top_p": "Top-p",
        "top_k": "Top-k",
        "repetition_penalty": "Repetition penalty",
        "presence_penalty": "Presence penalty",
        "frequency_penalty": "Frequency penalty",
        "max_tokens": "Longest reply, in tokens",
        "seed": "Seed",
    },
    system="System prompt",
    detail="Picture detail",
    details={"auto": "automatic", "low": "low", "high": "high"},
    schema="JSON schema of the reply",
    schema_hint='{"type": "object", "properties": {"color": {"type": "string"}}}',
    reset="Everything back to the model's own",
    code="The last request as code",
    no_code="Ask something first.",
    curl="curl",
    python="Python",
    status="Status",
    usage="{pictures} tokens of pictures and {text} of text in, {tokens} out",
    tokens_only="{prompt} tokens in, {tokens} out",
    first="first after {seconds:.2f} s",
    rate="then {rate:.0f} tokens/s",
    finish={
        "stop": "ended by itself",
        "length": "ended at the greatest length",
        "tool_calls": "calls a tool",
        "content_filter": "cut off by a filter",
    },
    request="request {id}",
    stopped="stopped",
    broken="the connection ended here",
    write_a_question="Write a question, too.",
    too_many_pictures="A conversation holds at most {most} pictures. Clear it, or undo some questions.",
    inside="What is in {box}?",
    errors={
        "loading": "The model is still being loaded. Send the question again when it is ready.",
        "no_model": "The server has no model {name!r}; it has {names}.",
        "lost": "The server at {base} does not answer. The conversation is kept: ask again when it is back.",
        "slow": "The server at {base} was silent for too long. Send the question again.",
        "cut_off": "The connection to the server ended in the middle of the reply. Regenerate it when it is back.",
        "key": "The server at {base} wants another API key. Start the demo with --api-key.",
        "busy": "The server is full. Send the question again in {seconds} s.",
        "too_large": "The pictures are too large for the server: {message}",
        "too_long": "The conversation is too long: {message}. Undo some questions, or clear it.",
        "refused": "The server refused the request: {message}",
        "failed": "The server failed on this request: {message}",
        "broken": "The page failed on this question; the terminal of the demo says why.",
        "number": "{name}: {value!r} is no number.",
        "schema": "The schema is no JSON object: {reason}",
    },
    footer="Qwen-VL's weights have a licence of their own. Do not use the model to harm; check what it says.",
)

ZH = Texts(
    language="zh",
    title="Qwen-VL in JAX",
    hint="添加图片并提问，回答所指之处会画在图上。模型可能出错。",
    other="English",
    other_path="/",
    loading="正在加载模型 …",
    ready="{name} 已就绪",
    chat="对话",
    question="问题",
    placeholder="就图片提问：可输入、粘贴或拖入图片 …",
    empty="**想知道什么？**\n\n在下方添加图片，或选择一个例子。",
    examples={
        "caption": ("描述", "图中有什么？"),
        "question": ("提问", "图中的十字形是什么颜色？"),
        "reading": ("读字", "图中写着什么数字？"),
        "counting": ("计数", "图中有几个物体？"),
        "grounding": ("定位", "框出黄色十字形的位置。"),
        "inside": ("看框内", "<box>(745,311),(936,621)</box>里面是什么？"),
        "pictures": ("两张图片", "Picture 2中写着什么？"),
        "chinese": ("用英文", "What is in the picture?"),
        "json": ("回答 JSON", "图中有什么？"),
    },
    more_pictures="从摄像头或网址添加图片",
    camera="摄像头",
    add_camera="把照片加入问题",
    address="图片网址",
    address_hint="https://…",
    add_address="加入问题",
    settings="参数",
    settings_hint="留空则用模型自己的设置。",
    own="模型：{value}",
    numbers={
        "temperature": "温度（0：总取最可能的）",
        "top_p": "Top-p",
        "top_k": "Top-k",
        "repetition_penalty": "重复惩罚",
        "presence_penalty": "存在惩罚",
        "frequency_penalty": "频率惩罚",
        "max_tokens": "回答最长词元数",
        "seed": "随机种子",
    },
    system="系统提示",
    detail="图片细节",
    details={"auto": "自动", "low": "低", "high": "高"},
    schema="回答的 JSON schema",
    schema_hint='{"type": "object", "properties": {"color": {"type": "string"}}}',
    reset="全部恢复为模型自己的设置",
    code="上一个请求的代码",
    no_code="请先提问。",
    curl="curl",
    python="Python",
    status="状态",
    usage="输入图片 {pictures} 词元、文字 {text} 词元，输出 {tokens} 词元",
    tokens_only="输入 {prompt} 词元，输出 {tokens} 词元",
    first="首词元 {seconds:.2f} 秒",
    rate="之后每秒 {rate:.0f} 词元",
    finish={
        "stop": "自然结束",
        "length": "达到最大长度",
        "tool_calls": "调用工具",
        "content_filter": "被过滤器截断",
    },
    request="请求 {id}",
    stopped="已停止",
    broken="连接在此中断",
    write_a_question="请也写一个问题。",
    too_many_pictures="一个对话最多 {most} 张图片。请清空，或撤销一些问题。",
    inside="{box}里面是什么？",
    errors={
        "loading": "模型还在加载，就绪后请重新发送。",
        "no_model": "服务器没有模型 {name!r}，只有 {names}。",
        "lost": "服务器 {base} 没有回应。对话已保留：服务器恢复后请重新发送。",
        "slow": "服务器 {base} 太久没有回应。请重新发送。",
        "cut_off": "回答中途与服务器的连接断开。服务器恢复后请重新生成。",
        "key": "服务器 {base} 需要另一个 API 密钥。启动时请用 --api-key。",
        "busy": "服务器已满。请在 {seconds} 秒后重新发送。",
        "too_large": "图片对服务器来说太大：{message}",
        "too_long": "对话太长：{message}。请撤销一些问题，或清空对话。",
        "refused": "服务器拒绝了请求：{message}",
        "failed": "服务器处理请求时出错：{message}",
        "broken": "页面处理此问题时出错，原因见演示程序的终端。",
        "number": "{name}：{value!r} 不是数字。",
        "schema": "schema 不是 JSON 对象：{reason}",
    },
    footer="Qwen-VL 的权重有其自己的许可证。请勿用于有害用途，并请核对模型所说的内容。",
)
