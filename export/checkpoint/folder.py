"""Which files of a folder are the checkpoint: what users give is a folder, a hub cache, a GGUF file, or the folder above."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from latentrt.export.errors import CheckpointError

INDEX, SINGLE, CONFIG = "model.safetensors.index.json", "model.safetensors", "config.json"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_NUMBERED = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\.\w+)")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_NO_WEIGHTS = re.compile(r"(adapter_|optimizer|scheduler|training_args|random_states|scaler|imatrix).*")


@dataclass(frozen=True)
class Found:
    """A checkpoint's files. `notes` are words for the user: what was passed over, and why."""

    path: Path  # the folder
    files: list[Path]  # safetensors, or GGUF
    is_gguf: bool = False
    index: dict[str, str] = field(default_factory=dict)  # tensor -> file name, where an index says so
    index_file: Path | None = None
    adapter: Path | None = None  # the folder of a LoRA adapter that lies beside the weights
    notes: list[str] = field(default_factory=list)


def find(path: Path) -> Found:
    """The checkpoint that `path` means. Raises CheckpointError that says what was found there, and what helps."""
    if path.is_file():
        return _single_file(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: not a folder; give the folder of a Hugging Face checkpoint{_download(path)}")
    folder = _snapshot(path)
    gguf = sorted(folder.glob("*.gguf"))
    if not (folder / CONFIG).exists() and not gguf:
        raise CheckpointError(f"{folder / CONFIG}: not found; {_elsewhere(folder)}")
    notes: list[str] = []
    files, index, index_file = _safetensors(folder, notes)
    if not files and gguf:
        return Found(folder, _gguf(folder, gguf, notes), is_gguf=True, notes=notes)
    if not files:
        raise CheckpointError(_without_weights(folder))
    return Found(folder, files, False, index, index_file, folder if (folder / ADAPTER_CONFIG).exists() else None, notes)


def _single_file(path: Path) -> Found:
    if path.suffix == ".gguf":
        numbered = _NUMBERED.fullmatch(path.name)
        siblings = sorted(path.parent.glob(f"{_escaped(numbered[1])}-?????-of-{numbered[3]}.gguf")) if numbered else [path]
        return Found(path.parent, _whole_set(path.parent, siblings), is_gguf=True)
    if path.suffix == ".safetensors" and (path.parent / CONFIG).exists():
        raise CheckpointError(f"{path}: is a file; give its folder, {path.parent}")
    raise CheckpointError(f"{path}: not a folder; give the folder of a Hugging Face checkpoint, or a .gguf file")


def _escaped(text: str) -> str:
    return re.sub(r"([\[\]*?])", r"[\1]", text)


def _download(path: Path) -> str:
    """Advice where the path looks like the name of a repository on the hub."""
    if len(path.parts) == 2 and not path.is_absolute() and ".." not in path.parts and not path.parent.exists():
        return f"; to get {path} from the Hugging Face hub: hf download {path} --local-dir {path.name}"
    return ""


def _snapshot(path: Path) -> Path:
    """The snapshot of a hub cache's folder (models--org--name): that of the branch main, or the only one."""
    root = path if (path / "snapshots").is_dir() else path.parent if path.name == "snapshots" else None
    if root is None or (path / CONFIG).exists():
        return path
    snapshots = sorted(p for p in (root / "snapshots").iterdir() if p.is_dir())
    main = root / "refs" / "main"
    named = root / "snapshots" / main.read_text().strip() if main.is_file() else None
    if named in snapshots:
        return named
    if len(snapshots) == 1:
        return snapshots[0]
    raise CheckpointError(
        f"{path}: a hub cache with {len(snapshots)} snapshots and no refs/main among them; "
        + (f"give one of them: {', '.join(map(str, snapshots[:5]))}" if snapshots else "download the checkpoint again")
    )


def _elsewhere(folder: Path) -> str:
    below = sorted(p.parent for p in [*folder.glob(f"*/{CONFIG}"), *folder.glob(f"*/snapshots/*/{CONFIG}")])
    if below:
        return f"give the folder that has it: {', '.join(map(str, below[:5]))}"
    if list(folder.glob("*.safetensors")):
        return "there are weights without it; copy the config.json of the model that they are made of beside them"
    return "a checkpoint is a folder with config.json and *.safetensors, or a .gguf file"


def _safetensors(folder: Path, notes: list[str]) -> tuple[list[Path], dict[str, str], Path | None]:
    """The weight files, and the index where one counts. A whole model.safetensors comes first, as in transformers."""
    indexes = sorted(folder.glob("*.safetensors.index.json"), key=lambda f: (f.name != INDEX, f.name))
    found = sorted(f for f in folder.glob("*.safetensors") if not _NO_WEIGHTS.match(f.name))
    if (folder / SINGLE).exists():
        index = _weight_map(indexes[0]) if indexes else {}
        named = set(index.values())
        if named == {SINGLE}:
            return [folder / SINGLE], index, indexes[0]
        if SINGLE not in named:
            _pass_over(notes, [f for f in [*indexes, *found] if f.name != SINGLE], f"{SINGLE} is read, as transformers does")
            return [folder / SINGLE], {}, None
    if indexes:
        index = _weight_map(indexes[0])
        files = [folder / name for name in sorted(set(index.values()))]
        missing = [f.name for f in files if not f.exists()]
        if missing:
            raise CheckpointError(f"{indexes[0]}: names missing shards: {', '.join(missing)}; download them again")
        _pass_over(notes, [f for f in found if f not in files], f"{indexes[0].name} does not name it")
        return files, index, indexes[0]
    shards = [f for f in found if not f.name.startswith("consolidated")] or found
    _pass_over(notes, [f for f in found if f not in shards], "the other files hold the weights")
    return _whole_set(folder, shards), {}, None


def _pass_over(notes: list[str], files: list[Path], why: str) -> None:
    if files:
        notes.append(f"{', '.join(f.name for f in files)} not read: {why}")


def _whole_set(folder: Path, files: list[Path]) -> list[Path]:
    """`files`, after a look that no shard of "...-00001-of-00004" is missing."""
    for file in files:
        numbered = _NUMBERED.fullmatch(file.name)
        if numbered is None:
            continue
        first = 0 if (folder / f"{numbered[1]}-00000-of-{numbered[3]}{numbered[4]}").exists() else 1
        count = range(first, int(numbered[3]) + first)
        wanted = [f"{numbered[1]}-{k:05d}-of-{numbered[3]}{numbered[4]}" for k in count]
        missing = [name for name in wanted if not (folder / name).exists()]
        if missing:
            raise CheckpointError(f"{folder}: shards are missing: {', '.join(missing[:10])}; download them again")
    return files


def _gguf(folder: Path, files: list[Path], notes: list[str]) -> list[Path]:
    """The one model among a folder's GGUF files."""
    sets: dict[str, list[Path]] = {}
    for file in files:
        numbered = _NUMBERED.fullmatch(file.name)
        if not _NO_WEIGHTS.match(file.name) and not file.name.startswith("mmproj"):
            sets.setdefault(numbered[1] if numbered else file.name, []).append(file)
    if len(sets) != 1:
        names = ", ".join(str(members[0]) for members in sets.values())
        raise CheckpointError(f"{folder}: holds {len(sets)} GGUF models; give the file of one: {names}")
    return _whole_set(folder, next(iter(sets.values())))


def _without_weights(folder: Path) -> str:
    if (folder / ADAPTER_CONFIG).exists():
        base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path", "its base model")
        return (
            f"{folder}: holds a LoRA adapter and no weights of its base; copy {ADAPTER_CONFIG} and {ADAPTER} into the "
            f"folder of {base}, where they are merged at build"
        )
    pickles = [f.name for pattern in _PICKLES for f in sorted(folder.glob(pattern))]
    if pickles:
        convert = "from transformers import AutoModelForCausalLM as M; M.from_pretrained('IN', dtype='auto')"
        return (
            f"{folder}: {pickles[0]} is a pickle, which is never read; convert it to safetensors: "
            f"python -c \"{convert}.save_pretrained('OUT')\""
        )
    return f"{folder}: found neither {SINGLE} nor {INDEX} nor any other *.safetensors; download the weights"


def _weight_map(file: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file}: no readable weight_map ({error!r})") from None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{file}: weight_map is {weight_map!r}, expected file names by tensor name")
    bad = [f for f in weight_map.values() if not isinstance(f, str)]
    bad = bad or [f for f in set(weight_map.values()) if Path(f).name != f or not f.endswith(".safetensors")]
    if bad:
        raise CheckpointError(f"{file}: weight_map names {bad[0]!r}; accepted: *.safetensors beside the index")
    return weight_map


def read_json(file: Path) -> dict:
    """A JSON object. Raises CheckpointError naming the file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not readable JSON ({error})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: holds {type(content).__name__}, a JSON object is expected")
    return content
