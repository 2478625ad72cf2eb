"""A processor that is saved without torchvision keeps the settings of its video half.

`AutoProcessor` needs torchvision for a family with a video half. Where there is none, what would be opened is compared
as it stands in the files.
"""

from __future__ import annotations

import json
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vlmtune.config.schema import ModelConfig
from vlmtune.models import pico
from vlmtune.prompt import image_only as module
from vlmtune.prompt import processors
from vlmtune.prompt.image_only import image_only, torchvision_works

DEFAULT = {"video_processor_type": "Qwen2VLVideoProcessor"}
SETTINGS = {**DEFAULT, "fps": 3, "patch_size": 14}
LEGACY = {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2VLProcessor", "patch_size": 14}
"""A preprocessor_config.json from before processors had a video half, such as Qwen2-VL's on the hub."""


@pytest.fixture
def base(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> Path:
    """Qwen2-VL's tokenizer, image processor and config, and no video half."""
    folder = tmp_path / "base"
    folder.mkdir()
    for file in checkpoint_of("qwen2_vl").iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    change(folder / "processor_config.json", video_processor=None)
    return folder


def change(file: Path, **values: Any) -> None:
    """Set values of a JSON file; None takes one out."""
    held = {**(json.loads(file.read_text()) if file.exists() else {}), **values}
    file.write_text(json.dumps({key: value for key, value in held.items() if value is not None}))


def saved(base: Path, to: Path) -> dict[str, Any]:
    """processor_config.json of a processor that was opened in `base` without torchvision."""
    processors.load_processor(ModelConfig(path=str(base))).save_pretrained(to)
    return dict(json.loads((to / "processor_config.json").read_text()))


@pytest.fixture
def without_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processors, "torchvision_works", lambda: False)


@pytest.mark.parametrize(
    ("file", "held", "expected"),
    [
        ("processor_config.json", {"video_processor": SETTINGS}, SETTINGS),
        ("video_preprocessor_config.json", SETTINGS, SETTINGS),
        ("video_preprocessor_config.json", {"fps": 3}, {**DEFAULT, "fps": 3}),
        ("preprocessor_config.json", LEGACY, {**DEFAULT, "patch_size": 14}),
        ("other.json", {}, DEFAULT),  # none
    ],
)
@pytest.mark.usefixtures("without_torchvision")
def test_the_bases_video_half_is_saved(
    base: Path, tmp_path: Path, file: str, held: dict[str, Any], expected: dict[str, Any]
) -> None:
    """From wherever transformers would read it; the class is named, because an adapter's folder has no config.json."""
    change(base / file, **held)
    found = saved(base, tmp_path / "model")
    assert found["video_processor"] == expected
    assert found["image_processor"]["image_processor_type"] == "Qwen2VLImageProcessor"
    shutil.copy(base / "config.json", tmp_path / "model")
    assert saved(tmp_path / "model", tmp_path / "again") == found


def test_a_base_without_a_video_half_opens_beside_torchvision_too(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`AutoProcessor` would refuse it: so do folders that were saved without torchvision by earlier versions."""
    monkeypatch.setattr(processors, "torchvision_works", lambda: True)
    opened = processors.load_processor(ModelConfig(path=str(base)))
    assert "video_processor" not in opened.get_attributes()


def test_pico_ships_the_video_half_that_its_builder_writes(tmp_path: Path) -> None:
    pico.build(tmp_path / "pico", 0)
    shipped = Path(pico.__file__).parent / "pico_weights" / "processor_config.json"
    assert json.loads((tmp_path / "pico" / shipped.name).read_text()) == json.loads(shipped.read_text())


def test_every_familys_video_class_is_found_without_torchvision() -> None:
    """transformers' table is emptied where torchvision is missing, so that it is read here from its source."""
    import transformers
    from transformers.models.auto import auto_mappings
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    table = runpy.run_path(auto_mappings.__file__)["VIDEO_PROCESSOR_MAPPING_NAMES"]
    known = {kind: classes["torchvision"] for kind, classes in table.items() if kind in PROCESSOR_MAPPING_NAMES}
    assert {"qwen2_vl", "qwen3_vl", "smolvlm", "internvl", "llava_onevision"} <= set(known)
    for kind, expected in known.items():
        images = IMAGE_PROCESSOR_MAPPING_NAMES.get(kind) or {}
        of = SimpleNamespace(image_processor=type(images.get("pil") or "None", (), {})())
        processor = type(PROCESSOR_MAPPING_NAMES[kind], (SimpleNamespace,), {})(**vars(of))
        assert module._video_class(processor, "") == expected
    borrowed = image_only(transformers.Qwen2_5_VLProcessor)  # has another family's, and is not in the table
    processor = type(borrowed.__name__, (SimpleNamespace,), {})(image_processor=transformers.Qwen2VLImageProcessorPil())
    assert module._video_class(processor, "") == "Qwen2VLVideoProcessor"


@pytest.mark.skipif(not torchvision_works(), reason="AutoProcessor of such a family needs torchvision")
@pytest.mark.usefixtures("without_torchvision")
def test_a_saved_processor_opens_in_transformers(base: Path, tmp_path: Path) -> None:
    from transformers import AutoProcessor

    change(base / "video_preprocessor_config.json", **SETTINGS)
    saved(base, tmp_path / "model")
    ours, theirs = (AutoProcessor.from_pretrained(folder) for folder in (tmp_path / "model", base))
    assert ours.video_processor.to_dict() == theirs.video_processor.to_dict()
