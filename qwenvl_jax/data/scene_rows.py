"""Training rows of scenes: a picture once, and many questions about it as branches of one packed row.

Rows are a pure function of (recipe, index), so the state of the data is one number. This file draws and tokenises; what
is asked is decided in `questions.py` and `conversations.py`, how rows become batches in `pipeline.py`.
"""

import bisect
import dataclasses

import numpy as np

from qwenvl_jax.config import QwenVLConfig, UserError
from qwenvl_jax.data.conversations import multi_turn, two_pictures
from qwenvl_jax.data.packing import RowShape, pack_branches
from qwenvl_jax.data.questions import KIND_WEIGHTS, KINDS, Question, as_parts, scene_questions
from qwenvl_jax.data.scenes import sample_scene, scene_rng
from qwenvl_jax.processing import template
from qwenvl_jax.processing.images import preprocess
from qwenvl_jax.processing.template import IGNORED, Segment
from qwenvl_jax.processing.tokenizer import Tokenizer

ROW = RowShape(prefix=96, blocks=4, block=64, targets=112)
PAIR_ROW = RowShape(prefix=192, blocks=2, block=64, targets=64)  # of records with two pictures
PAIR_CONVERSATIONS = 6  # offered per pair of pictures
CONVERSATION = 1 + len(KINDS)  # the kind of a branch with several turns or pictures


@dataclasses.dataclass(frozen=True)
class SceneRecipe:
    """What the training pictures show and what is asked about them."""

    seed: int = 0
    split: str = "train"
    questions: int = 12  # offered per picture; as many as fit into the row are asked
    conversation_share: float = 0.15  # of the pictures, that also carry a conversation of several turns
    chinese_share: float = 0.25
    text_share: float = 0.5  # of the pictures, that carry a written word or number
    two_pictures_every: int = 16  # every so many batches, one about pairs of pictures; 0: never
    # The most objects in a picture from each share of the run on, for example [[0, 1], [0.5, 6]].
    curriculum: tuple[tuple[float, int], ...] = ((0.0, 6),)
    weights: dict[str, float] = dataclasses.field(default_factory=lambda: dict(KIND_WEIGHTS))
    cells: int = 2  # auxiliary labels per side of a query's part of the picture
    row: RowShape = ROW
    pair_row: RowShape = PAIR_ROW

    def __post_init__(self):
        unknown = set(self.weights) - set(KIND_WEIGHTS)
        if unknown:
            raise UserError(f"data.weights names {min(unknown)!r}; there are {', '.join(KIND_WEIGHTS)}")
        shares = [share for share, _ in self.curriculum]
        if not shares or shares[0] != 0 or shares != sorted(shares):
            raise UserError(f"data.curriculum has the shares {shares}; they must begin with 0 and rise")


class SceneRows:
    """A random-access source of packed rows, as many as steps x batch size. Grain pickles it into its workers."""

    def __init__(self, recipe: SceneRecipe, vocabulary: str, config: QwenVLConfig, steps: int, batch_size: int):
        self.recipe, self.vocabulary, self.config = recipe, vocabulary, config
        self.steps, self.batch_size = steps, batch_size
        self._tokenizer: Tokenizer | None = None

    def __getstate__(self):
        return self.__dict__ | {"_tokenizer": None}  # tiktoken's encoder does not pickle

    @property
    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            self._tokenizer = Tokenizer.from_file(self.vocabulary, self.config.visual.n_queries)
        return self._tokenizer

    def __len__(self) -> int:
        return self.steps * self.batch_size

    def max_objects(self, step: int) -> int:
        """The curriculum's bound at a step."""
        stages = self.recipe.curriculum
        return stages[bisect.bisect_right([share for share, _ in stages], step / self.steps) - 1][1]

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """The row of an index, see `pack_branches`, with "branch_kind", "pixels" and "cell/..." labels."""
        recipe, step = self.recipe, index // self.batch_size
        every = recipe.two_pictures_every
        paired = bool(every) and step % every == every - 1
        most = self.max_objects(step)
        scenes = [
            sample_scene(recipe.seed, recipe.split, 2 * index + i, most, recipe.text_share)
            for i in range(2 if paired else 1)
        ]
        rng = scene_rng(recipe.seed + 1, recipe.split, index)
        if paired:
            first, second = scenes
            turns = [two_pictures(first, second, rng, 2, recipe.chinese_share).turns for _ in range(PAIR_CONVERSATIONS)]
            branches = [(CONVERSATION, self._turns(list(asked), second)) for asked in turns]
        else:
            branches = self._questions(scenes[0], rng)
        tokens = [branch for _, branch in branches]
        row = pack_branches(self._prefix(len(scenes)), tokens, recipe.pair_row if paired else recipe.row)
        row["branch_kind"] = np.zeros(max(recipe.questions, PAIR_CONVERSATIONS) + 2, np.int32)
        row["branch_kind"][1 : len(branches) + 1] = [kind for kind, _ in branches]
        row["pixels"] = preprocess([scene.draw() for scene in scenes], self.config.visual.image_size)
        labels = [scene.cell_labels(self.config.visual.query_grid * recipe.cells) for scene in scenes]
        return row | {f"cell/{name}": np.stack([label[name] for label in labels]) for name in labels[0]}

    def _questions(self, scene, rng) -> list[tuple[int, tuple[Segment, list[int]]]]:
        """Branches about one picture with the kind of each: 1 + its index in KINDS, or CONVERSATION."""
        recipe = self.recipe
        asked = scene_questions(scene, rng, recipe.questions, recipe.weights, recipe.chinese_share)
        branches = [(1 + KINDS.index(question.kind), self._turns([question], scene)) for question in asked]
        if rng.random() < recipe.conversation_share:
            conversation = multi_turn(scene, rng, 2, recipe.chinese_share, recipe.weights)
            branches.insert(0, (CONVERSATION, self._turns(list(conversation.turns), scene)))
        return branches

    def _prefix(self, pictures: int) -> Segment:
        """Everything before the first question: the system message and the pictures."""
        tok = self.tokenizer
        system = template.block(tok, "system", template.segment(tok, [template.DEFAULT_SYSTEM])) + template.newline(tok)
        pieces = [piece for i in range(pictures) for piece in template.picture_pieces(tok, i, i + 1)]
        return system + template.header(tok, "user") + template.segment(tok, pieces)

    def _turns(self, turns: list[Question], scene) -> tuple[Segment, list[int]]:
        """Questions and answers after the prefix, with labels on the answers and what closes them."""
        tok, size = self.tokenizer, (scene.width, scene.height)
        end, newline = template.plain([tok.im_end_id]), template.newline(tok)
        tokens, labels = Segment([], []), []
        for i, turn in enumerate(turns):
            before = newline + template.header(tok, "user") if i else Segment([], [])
            before = before + self._content(turn.question, size) + end + newline + template.header(tok, "assistant")
            answer = self._content(turn.answer, size) + end
            tokens = tokens + before + answer
            labels += [IGNORED] * len(before) + answer.ids
        return tokens, labels

    def _content(self, content, size: tuple[int, int]) -> Segment:
        pieces = []
        for part in as_parts(content):
            if part["type"] == "text":
                pieces.append(part["text"])
            else:
                pieces += template.box_pieces(self.tokenizer, part["label"], part["box"], size)
        return template.segment(self.tokenizer, pieces)
