"""Which fields PEFT's and transformers' own config classes take, read from their sources without importing them.

Importing either takes seconds; a typo deserves an answer at once. The classes themselves check again when a run
builds them.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path

Fields = dict[str, list[str]]
NOT_FOR_USERS = {
    "peft_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "task_type",
}


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{package} is not installed; run `make install`")
    return Path(spec.submodule_search_locations[0])


def _classes(files: list[Path]) -> dict[str, ast.ClassDef]:
    trees = (ast.parse(file.read_text(encoding="utf-8")) for file in files)
    return {node.name: node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)}


def _calls(tree: ast.AST, name: str) -> Iterator[dict[str, ast.expr]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name:
            yield {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}


def _dataclass_fields(name: str, classes: dict[str, ast.ClassDef]) -> list[str]:
    """Fields of a dataclass and of its bases, as far as those are in `classes`."""
    if name not in classes:
        return []
    node = classes[name]
    inherited = [
        field for base in node.bases if isinstance(base, ast.Name) for field in _dataclass_fields(base.id, classes)
    ]
    own = [
        item.target.id for item in node.body if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
    ]
    return [*inherited, *own]


@functools.cache
def adapter_fields() -> Fields:
    """Fields a user may set, per PEFT method (`lora`, `ia3`, ...), from PEFT's registry calls and dataclasses."""
    folder = _folder("peft")
    packages = [file.parent for file in sorted(folder.glob("tuners/*/__init__.py"))]
    classes = _classes([folder / "config.py", *folder.glob("tuners/*.py"), *folder.glob("tuners/*/config.py")])
    methods: Fields = {}
    for package in packages:
        for call in _calls(ast.parse((package / "__init__.py").read_text(encoding="utf-8")), "register_peft_method"):
            name, config = call.get("name"), call.get("config_cls")
            if isinstance(name, ast.Constant) and isinstance(config, ast.Name):
                fields = _dataclass_fields(config.id, classes)
                methods[str(name.value)] = [field for field in fields if field not in NOT_FOR_USERS]
    return methods


@functools.cache
def quantization_fields() -> Fields:
    """Parameters of each quantization config class, by transformers' registry name (`bitsandbytes_4bit`, ...)."""
    folder = _folder("transformers")
    classes = _classes([folder / "utils" / "quantization_config.py"])
    mapping = _dict_literal(folder / "quantizers" / "auto.py", "AUTO_QUANTIZATION_CONFIG_MAPPING")
    return {method: _init_parameters(classes[name]) for method, name in mapping.items() if name in classes}


def _dict_literal(file: Path, name: str) -> dict[str, str]:
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if not (isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)):
            continue
        if any(isinstance(target, ast.Name) and target.id == name for target in node.targets):
            pairs = zip(node.value.keys, node.value.values, strict=True)
            return {str(k.value): v.id for k, v in pairs if isinstance(k, ast.Constant) and isinstance(v, ast.Name)}
    raise LookupError(f"{name} is not in {file.name} of this transformers version")


def _init_parameters(node: ast.ClassDef) -> list[str]:
    init = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    if init is None:
        return []
    return [argument.arg for argument in init.args.args[1:] + init.args.kwonlyargs]
