"""The training presets that ship with the package: YAML files with a `model` and a `training` section."""

from pathlib import Path
from typing import Any

import yaml

# An installed package has them beside this module, an editable one in the repository.
_FOLDERS = (Path(__file__).parent / "configs", Path(__file__).parents[3] / "training" / "configs")


def preset_names() -> list[str]:
    """Names of the presets, sorted."""
    return sorted({path.stem for folder in _FOLDERS for path in folder.glob("*.yaml")})


def load_preset(name_or_path: str) -> dict[str, dict[str, Any]]:
    """Reads a preset by name ("cifar10") or path: {"model": fields of CtrlCscConfig, "training": settings of train.py}.

    Raises:
        ValueError: if there is no such preset or file, which the message lists, if it is no YAML, and if it has other
            sections.
    """
    candidates = [Path(name_or_path), *(folder / f"{name_or_path}.yaml" for folder in _FOLDERS)]
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        raise ValueError(f"a preset must be a YAML file or one of {preset_names()}, got {name_or_path!r}")
    try:
        sections = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} must be a YAML file, but cannot be read as one: {' '.join(str(error).split())}"
        ) from error
    if not isinstance(sections, dict) or set(sections) - {"model", "training"}:
        raise ValueError(f"{path} must hold the sections model and training, got {sections!r}")
    if wrong := {name: section for name, section in sections.items() if not isinstance(section, dict | None)}:
        raise ValueError(f"{path}: sections must hold entries of the form 'name: value', got {wrong!r}")
    return {name: dict(sections.get(name) or {}) for name in ("model", "training")}
