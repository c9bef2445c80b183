"""The two Java programs that come with pycocoevalcap: the Penn Treebank tokenizer of captions, and METEOR's matcher.

Only captions need them; without Java or the package there is one line that says so.
"""

import importlib.util
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from qwenvl_jax.config import UserError

PUNCTUATION = {
    "''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";",
}  # fmt: skip
TOKENIZER = ("tokenizer", "stanford-corenlp-3.4.1.jar")
METEOR = ("meteor", "meteor-1.5.jar")
UTF8 = ("-Dfile.encoding=UTF-8", "-Dstdout.encoding=UTF-8")  # left alone, programs ask the locale
# How a caption may break into lines, each of which the tokenizer would take for a caption.
_TO_BLANKS = str.maketrans(dict.fromkeys("\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029", " "))


def run(jar: tuple[str, str], arguments: Sequence[str], lines: Sequence[str]) -> list[str]:
    """The lines that a program of pycocoevalcap writes when it reads `lines`; JAR in the arguments is its file."""
    java = shutil.which("java")
    if java is None:
        raise UserError("captions are tokenised in Java, and there is no java: install one, or score with vlmevalkit")
    try:
        package = importlib.util.find_spec(f"pycocoevalcap.{jar[0]}")
    except ModuleNotFoundError:
        package = None
    if package is None or not package.submodule_search_locations:
        raise UserError(
            "captions are tokenised by pycocoevalcap: pip install 'qwenvl-jax[eval]', or score with vlmevalkit"
        )
    file = Path(package.submodule_search_locations[0], jar[1])
    done = subprocess.run(
        [java, *UTF8, *(str(file) if argument == "JAR" else argument for argument in arguments)],
        input="".join(line + "\n" for line in lines).encode(),
        capture_output=True,
        check=False,
    )
    if done.returncode:
        error = done.stderr.decode(errors="replace").strip().splitlines()
        raise UserError(f"java could not run {file}: {error[-1] if error else f'it ended with {done.returncode}'}")
    return done.stdout.decode().split("\n")


def ptb_tokens(captions: Sequence[str]) -> list[str]:
    """Captions as CIDEr and its like take them: PTB tokens in lower case with blanks between, without punctuation."""
    if not captions:
        return []
    arguments = ("-cp", "JAR", "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase")
    lines = run(TOKENIZER, arguments, [caption.translate(_TO_BLANKS) for caption in captions])
    if len(lines) < len(captions):
        raise UserError(f"the tokenizer gave {len(lines)} lines for {len(captions)} captions")
    return [
        " ".join(token for token in line.rstrip().split(" ") if token not in PUNCTUATION)
        for line in lines[: len(captions)]
    ]
