"""From data files to rows: JSON lines or one JSON array, gzipped or not; all else is an error
whose sentence says what to do."""
import gzip
import hashlib
import itertools
import json
import os
import re
import zlib
from collections.abc import Iterator

from files.text import json_value, likely_cause, sha256

ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".json.gz")           # what a folder is searched for
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
TABLES = {".parquet": "parquet('{}')", ".csv": "csv('{}')", ".tsv": "csv('{}', sep='\\t')"}

# Text shrinks 3 to 20 times when it is gzipped, zeros a thousand times: a file that unpacks to more
# than 100 times its size is no data. Small files may hold the same row many times.
UNPACKED_RATIO, UNPACKED_FREE, UNPACKED_MOST = 100, 64 << 20, 16 << 30           # bytes


# ---- files --------------------------------------------------------------------------------------

def how_to_convert(path: str) -> str:
    """Suffix for an error message: the command that makes JSON lines of a table; "" for others."""
    name, ending = os.path.splitext(path.removesuffix(".gz"))
    if ending.lower() not in TABLES:
        return ""
    return ("; convert it: pip install pandas pyarrow && python -c \"import pandas; pandas.read_"
            f"{TABLES[ending.lower()].format(path)}.to_json('{name}.jsonl', orient='records', "
            "lines=True)\"")


def data_files(dataset: str) -> list[str]:
    """The files that --dataset names: a file, a folder (its JSON files, by name), or several with
    commas between them.

    raises   FileNotFoundError, saying what to do, for what is not there
    """
    if os.path.isfile(dataset):
        return [dataset]
    if os.path.isdir(dataset):
        names = sorted(os.listdir(dataset))
        if found := {"config.json", "adapter_config.json", "args.json"} & set(names):
            raise ValueError(f"{dataset} holds {', '.join(sorted(found))}: it is the folder of a "
                             "model or a run, not of data")
        files = [os.path.join(dataset, name) for name in names if name.endswith(ENDINGS)]
        if not files:
            hints = [*filter(None, (how_to_convert(os.path.join(dataset, name)) for name in names))]
            raise FileNotFoundError(f"{dataset}: no such data file: the folder holds no file that "
                                    f"ends in {', '.join(ENDINGS)}{''.join(hints[:1])}" + (
                                        f", and the {len(hints) - 1} other tables alike"
                                        if hints[1:] else ""))
        return files
    if "," in dataset:
        return [file for part in dataset.split(",") for file in data_files(part.strip())]
    hint = ""
    if re.fullmatch(r"[\w-]+/[\w.-]+", dataset) and not os.path.isdir(os.path.dirname(dataset)):
        hint = ("; if it is on the Hugging Face Hub, save it first: pip install datasets && python "
                f"-c \"import datasets; datasets.load_dataset('{dataset}', split='train')"
                f".to_json('{os.path.basename(dataset)}.jsonl')\"")
    raise FileNotFoundError(f"{dataset}: no such data file{hint}")


def dataset_sha256(dataset: str) -> str:
    """The SHA-256 of a data file; of several, that of their names and digests."""
    files = data_files(dataset)
    if len(files) == 1:
        return sha256(files[0])
    listed = [(os.path.basename(file), sha256(file)) for file in files]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


# ---- rows ---------------------------------------------------------------------------------------

def read_lines(path: str) -> Iterator[bytes]:
    """The lines of a file, unpacked if it is gzipped; one at a time, so memory holds one."""
    with open(path, "rb") as file:
        start = file.read(20)
        file.seek(0)
        if start[:2] != b"\x1f\x8b":
            if path.endswith(".gz"):
                raise ValueError(f"{path}: not a gzip file (it starts with {start!r})")
            yield from file
            return
        left = min(UNPACKED_MOST, max(UNPACKED_FREE, UNPACKED_RATIO * os.path.getsize(path)))
        try:
            unpacked = gzip.GzipFile(fileobj=file)
            while line := unpacked.readline(left + 1):
                left -= len(line)
                if left < 0:
                    raise ValueError(f"{path}: unpacks to more than {UNPACKED_RATIO} times its "
                                     "size, or more than 16 GiB; if you trust it, gunzip it first")
                yield line
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: damaged gzip file: {error}") from None


def read_rows(path: str) -> Iterator[tuple[str, dict]]:
    """(where, row) of every row of a JSON-lines or JSON-array file; ValueError names the line."""
    if hint := how_to_convert(path) or likely_cause(path):
        raise ValueError(f"{path}: not a data file{hint}")
    lines = enumerate(read_lines(path), 1)
    lines = ((number, line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line)
             for number, line in lines)
    lines = ((number, line) for number, line in lines if line.strip())
    first, rows = next(lines, None), []
    if first and first[1].lstrip().startswith(b"["):
        whole = b"".join([first[1], *(line for _, line in lines)])
        rows = [(f"{path}[{number}]", row) for number, row in enumerate(parse_json(whole, path))]
    elif first:
        rows = ((f"{path}:{number}", parse_json(line, f"{path}:{number}"))
                for number, line in itertools.chain([first], lines))
    if not first or rows == []:
        raise ValueError(f"{path}: no rows")
    for where, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected an object with keys, got {str(row)[:80]!r}")
        yield where, row


def parse_json(raw: bytes, where: str) -> object:
    """`json_value`; its ValueError says where, and how the bytes begin."""
    try:
        return json_value(raw)
    except ValueError as error:                      # JSON and Unicode errors are ValueErrors
        excerpt, hint = raw[:80].decode("utf-8", "replace").strip(), ""
        if isinstance(error, UnicodeDecodeError):
            encoding = "utf-16" if b"\0" in raw[:80] else "latin1"
            hint = f"; convert it to UTF-8: iconv -f {encoding} -t utf-8 FILE > NEW"
        raise ValueError(f"{where}: bad JSON: {error}{hint}; it starts with {excerpt!r}") from None


# ---- values of a row ----------------------------------------------------------------------------

TEXT = (str, list)                         # a text, or a list of messages
NUMBER = (int, float)
LARGEST = 1e300                            # of a number: twice as much is a float, too


def get_value(row: dict, key: str, kind: type | tuple[type, ...], where: str):
    """row[key], which must be of a kind, as isinstance takes it; ValueError names row and key."""
    if key not in row:
        raise ValueError(f"{where}: key {key!r} is missing; found {', '.join(map(repr, row))}")
    if not isinstance(row[key], kind) or kind == NUMBER and not abs(row[key]) < LARGEST:
        kinds = {TEXT: "text or a list of messages", NUMBER: "a number"}
        raise ValueError(f"{where}: {key!r} is {str(row[key])[:60]!r}; expected "
                         f"{kinds[kind] if kind in kinds else kind.__name__}")
    return row[key]


def get_texts(row: dict, key: str, where: str, size: int | None = None) -> list[str]:
    """row[key], which must be a list of `size` texts, or of at least one."""
    texts = get_value(row, key, list, where)
    if len(texts) != (size or len(texts) or 1) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{where}: {key} is {str(texts)[:60]!r}; expected a list of "
                         f"{f'{size} ' if size else ''}texts")
    return texts


def get_score(row: dict, where: str) -> tuple[float, list[str]]:
    """(z, notes): the label or score of a row; 1 for a demonstration, which has neither.

    raises   ValueError for a score under another name, which would be taken for a demonstration
    """
    key = "label" if "label" in row else "score"
    if key not in row:
        for other in row:
            if re.search("label|score|rating|reward|kto", other, re.IGNORECASE):
                raise ValueError(f"{where}: no 'label' and no 'score', but {other!r}: call it "
                                 "'label' (true or false) or 'score' (0 to 1), or remove it")
        return 1.0, ["demonstrations: no label or score, so z = 1"]
    score = row[key]
    if not isinstance(score, (bool, int, float)) or not 0 <= score <= 1:
        raise ValueError(f"{where}: label or score {score!r} is outside [0, 1]")
    return float(score), []
