"""What lies where a model, an adapter or a run was expected: hints for error messages."""
import os
import re

from files.text import read_json


def names_in(path: str) -> list[str]:
    return os.listdir(path) if os.path.isdir(path) else []


def unfinished(run: str) -> str:
    """Suffix for an error message if the folder of a run has no result yet, else ""."""
    names = names_in(run)
    if "args.json" not in names or "final" in names:
        return ""
    steps = [int(found[1]) for name in names if (found := re.fullmatch(r"checkpoint-(\d+)", name))]
    saved = f", saved at step {max(steps)}" if steps else ""
    return f"; {run} is an unfinished run{saved}: the command that started it continues it"


def what_it_is(path: str, wanted: str) -> str:
    """Suffix for an error message: what lies at `path` instead, and what to do; "" if it is right.

    wanted   "model", "adapter" or "run"
    """
    path = os.path.normpath(path)
    names, parent = names_in(path), os.path.dirname(path)
    if not os.path.lexists(path):
        hint = f"; there is no folder {path}"
        if re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not os.path.isdir(parent):
            name = os.path.basename(path)
            hint += ("; if it is on the Hugging Face Hub, fetch it: pip install huggingface_hub && "
                     f"hf download {path} --local-dir {name}; then give {name}")
        return unfinished(parent) or hint
    if not os.path.isdir(path):
        return f"; {path} is a file, and the folder is expected"
    if "args.json" in names:
        return unfinished(path) or ("" if wanted == "run" else
                                    f"; {path} is a run, and its result is {path}/final")
    if os.path.isfile(os.path.join(parent, "args.json")) and wanted == "run":
        return f"; the run is {parent}"
    if "adapter_config.json" in names and wanted != "adapter":
        base = read_json(os.path.join(path, "adapter_config.json")).get("base_model_name_or_path")
        return f"; {path} is an adapter, of the model {base}"
    if "config.json" in names and wanted != "model":
        return f"; {path} is a whole model"
    return ""
