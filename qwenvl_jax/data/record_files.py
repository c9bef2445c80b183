"""Readers of files of training rows: random access to raw rows, each a dictionary, and where a row stands.

Nothing is kept in memory but where rows begin, and for parquet the row group read last. All readers pickle: worker
processes open the files anew. What a row means is in `record_forms.py`.
"""

import contextlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwenvl_jax.config import UserError
from qwenvl_jax.data.problems import RecordError, record_error

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_BLANKS = re.compile(r"[ \t\r\n]*")


def head(path: Path, count: int) -> bytes:
    """The first `count` bytes of a file. Raises UserError."""
    try:
        with path.open("rb") as file:
            return file.read(count)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


class JsonRows:
    """Rows of a JSON file: a list of objects, or with `lines` one object per line (blank lines do not count).

    Raises RecordError naming the line where a list cannot be read; a wrong line of JSON lines is wrong by itself.
    """

    def __init__(self, path: Path, *, lines: bool):
        self.path = path
        try:
            self._starts, self._stops, self._lines = _line_spans(path) if lines else _array_spans(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        if lines and path.suffix == ".json" and len(self) > 1:
            self._refuse_one_object()

    def __len__(self) -> int:
        return len(self._starts)

    def where(self, index: int) -> str:
        return f"{self.path}:{self._lines[index]}"

    def __getitem__(self, index: int) -> Any:
        start, stop = int(self._starts[index]), int(self._stops[index])
        try:
            with self.path.open("rb") as file:
                file.seek(start)
                content = file.read(stop - start)
        except OSError as error:
            raise record_error("", f"cannot be read ({error.strerror})", "", self.where(index)) from None
        return parse_json(content)

    def _refuse_one_object(self) -> None:
        """A .json file that is one object written over many lines would otherwise give an error for each of them."""
        try:
            parse_json(self.path.read_bytes())
        except RecordError:
            return
        advice = "write a list of records, [{...}, {...}], or one record per line"
        raise record_error("", "one JSON object over many lines", advice, self.where(0))


def parse_json(content: bytes) -> Any:
    """The value in `content`. Raises RecordError."""
    try:
        return json.loads(content.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise record_error("", f"not JSON ({error.msg} at character {error.pos})", "mend or remove the line") from None
    except (ValueError, RecursionError) as error:  # no UTF-8, a number of thousands of digits, lists in lists in lists
        raise record_error("", f"not JSON ({str(error) or 'nested too deeply'})", "mend or remove the line") from None


def _line_spans(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Start and stop byte and line number, from 1, of the lines that hold something."""
    spans, position = [], 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.removeprefix(BYTE_ORDER_MARK).strip():
                spans.append((position, position + len(line), number))
            position += len(line)
    return _columns(spans)


def _array_spans(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same for the elements of a JSON list, whose line is that of their first character."""
    content = path.read_bytes()
    byte = len(BYTE_ORDER_MARK) if content.startswith(BYTE_ORDER_MARK) else 0
    try:
        text = content[byte:].decode("utf-8")
    except UnicodeDecodeError as error:
        line = content[: byte + error.start].count(b"\n") + 1
        raise record_error("", f"not UTF-8 ({error.reason})", "save the file as UTF-8", f"{path}:{line}") from None
    decode = json.JSONDecoder().raw_decode
    spans: list[tuple[int, int, int]] = []
    seen, line = 0, 1  # characters whose bytes and lines are counted

    def fail(wrong: str, position: int) -> RecordError:
        at = text.count("\n", 0, position) + 1
        return record_error("", f"not JSON ({wrong})", "nothing from there on can be read; mend it", f"{path}:{at}")

    position = _after_blanks(text, text.index("[") + 1)
    while text[position : position + 1] != "]" or spans:
        try:
            _, stop = decode(text, position)
        except json.JSONDecodeError as error:
            raise fail(error.msg, error.pos) from None
        except (ValueError, RecursionError) as error:
            raise fail(str(error) or "nested too deeply", position) from None
        line += text.count("\n", seen, position)
        start = byte + len(text[seen:position].encode())
        byte, seen = start + len(text[position:stop].encode()), position
        spans.append((start, byte, line))
        line += text.count("\n", seen, stop)
        seen = stop
        following = _after_blanks(text, stop)
        if text[following : following + 1] == "]":
            position = following
            break
        if text[following : following + 1] != ",":
            raise fail("a comma or ] is missing after a record", stop)
        position = _after_blanks(text, following + 1)
    rest = _after_blanks(text, position + 1)
    if rest < len(text):
        raise fail("something follows the closing ]", rest)
    return _columns(spans)


def _after_blanks(text: str, position: int) -> int:
    match = _BLANKS.match(text, position)
    return match.end() if match else position


def _columns(spans: Sequence[tuple[int, int, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    starts, stops, lines = np.array(spans, np.int64).reshape(-1, 3).T.copy()
    return starts, stops, lines


class TableRows:
    """Rows of parquet or Arrow files (Arrow's stream format, as Hugging Face datasets save it, or its file format).

    Arrow files are mapped into memory. Of parquet a whole row group is read for one row, and kept until a row of
    another group is asked for.
    """

    def __init__(self, paths: Sequence[Path]):
        _pyarrow()
        self.paths = list(paths)
        self._tables: dict[Any, Any] = {}
        pieces = [(path, group, rows) for path in self.paths for group, rows in self._groups(path)]
        self._pieces = [(path, group) for path, group, _ in pieces]
        self._ends = np.cumsum([rows for *_, rows in pieces], dtype=np.int64)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_tables": {}}

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def where(self, index: int) -> str:
        path, _, _ = self._find(index)
        first = next(self._start(number) for number, piece in enumerate(self._pieces) if piece[0] == path)
        return f"{path}:{index - first + 1}"

    def __getitem__(self, index: int) -> Any:
        path, group, row = self._find(index)
        try:
            (content,) = self._table(path, group).slice(row, 1).to_pylist()
        except (OSError, ValueError) as error:  # pyarrow's errors are kinds of these
            raise record_error("", f"cannot be read ({_first_line(error)})", "write the file anew") from None
        return content

    def _find(self, index: int) -> tuple[Path, int | None, int]:
        """File, row group (None: the whole file) and row in it."""
        number = int(np.searchsorted(self._ends, index, side="right"))
        path, group = self._pieces[number]
        return path, group, index - self._start(number)

    def _start(self, piece: int) -> int:
        return int(self._ends[piece - 1]) if piece else 0

    def _groups(self, path: Path) -> list[tuple[int | None, int]]:
        """(row group, number of rows) of a file."""
        _, parquet = _pyarrow()
        try:
            if path.suffix != ".parquet" and head(path, 4) != b"PAR1":
                return [(None, self._table(path, None).num_rows)]
            metadata = parquet.read_metadata(path)
        except (OSError, ValueError) as error:
            raise record_error(
                "", f"not a whole parquet or Arrow file ({_first_line(error)})", "write or fetch it anew", str(path)
            ) from None
        return [(group, metadata.row_group(group).num_rows) for group in range(metadata.num_row_groups)]

    def _table(self, path: Path, group: int | None) -> Any:
        tables = self._tables
        if (path, group) not in tables:
            arrow, parquet = _pyarrow()
            if group is not None:
                tables = {key: table for key, table in tables.items() if key[1] is None}
                with parquet.ParquetFile(path) as file:
                    tables[path, group] = file.read_row_group(group)
            else:
                open_table = arrow.ipc.open_file if head(path, 6) == b"ARROW1" else arrow.ipc.open_stream
                tables = tables | {(path, group): open_table(arrow.memory_map(os.fspath(path))).read_all()}
            self._tables = tables
        return tables[path, group]


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError("parquet and Arrow files need pyarrow: pip install 'qwenvl-jax[data]'") from None
    return pyarrow, pyarrow.parquet


class ArrayRecordRows:
    """Rows of ArrayRecord files, each a JSON object in UTF-8."""

    def __init__(self, paths: Sequence[Path]):
        from grain.sources import ArrayRecordDataSource  # slow to import

        self.name = str(paths[0] if len(paths) == 1 else paths[0].parent)
        try:
            self._source = ArrayRecordDataSource([str(path) for path in paths])
            self._length = len(self._source)
        except Exception as error:  # what the C++ reader raises has no common kind
            raise record_error(
                "", f"not an ArrayRecord file ({_first_line(error)})", "write it anew", self.name
            ) from None

    def __len__(self) -> int:
        return self._length

    def where(self, index: int) -> str:
        return f"{self.name}:{index + 1}"

    def __getitem__(self, index: int) -> Any:
        try:
            content = self._source[index]
        except Exception as error:
            raise record_error("", f"cannot be read ({_first_line(error)})", "write the file anew") from None
        return parse_json(content)


class TfdsRows:
    """Rows of a split of a dataset that TensorFlow Datasets has prepared, read without TensorFlow.

    The folder of datasets is $TFDS_DATA_DIR, else TFDS's own. Pictures stay the bytes of their files.
    """

    def __init__(self, name: str, split: str):
        try:
            import tensorflow_datasets as tfds
        except ImportError:
            raise UserError("tfds: names need tensorflow-datasets: pip install 'qwenvl-jax[data]'") from None
        self._arguments = name, split
        self.name = f"tfds:{name}#{split}"
        try:
            builder = tfds.builder(name, data_dir=os.environ.get("TFDS_DATA_DIR"))
            features = builder.info.features or {}
            pictures = [key for key, feature in features.items() if isinstance(feature, tfds.features.Image)]
            decoders = {key: tfds.decode.SkipDecoding() for key in pictures}
            self._source: Any = builder.as_data_source(split=split, decoders=decoders or None)
        except Exception as error:  # unknown names, splits, file formats, folders: each its own kind of error
            advice = f"it must lie prepared in $TFDS_DATA_DIR: tfds build {name} --file_format=array_record"
            raise UserError(f"{self.name}: cannot be opened ({_first_line(error)}); {advice}") from None

    def __reduce__(self) -> tuple:
        return TfdsRows, self._arguments  # opened anew: not every builder pickles

    def __len__(self) -> int:
        return len(self._source)

    def where(self, index: int) -> str:
        return f"{self.name}:{index + 1}"

    def __getitem__(self, index: int) -> Any:
        try:
            return _plain(self._source[index])
        except Exception as error:
            raise record_error("", f"cannot be read ({_first_line(error)})", "prepare the dataset anew") from None


def _plain(value: Any) -> Any:
    """A TFDS example as JSON would have it: bytes that are text as strings, arrays of objects as lists."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.dtype.kind in "OSU"):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, bytes):
        with contextlib.suppress(UnicodeDecodeError):  # JPEG, PNG and WEBP files are never UTF-8
            return value.decode("utf-8")
    return value


def _first_line(error: Exception) -> str:
    return (str(error).strip().split("\n")[0] or type(error).__name__)[:200]
