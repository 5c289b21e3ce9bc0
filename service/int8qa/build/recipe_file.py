"""Recipes of one's own, from small YAML files.

In: the name of a built-in recipe, or the path of a YAML file. Out: a
:class:`~int8qa.build.quantization.Recipe`. A file is untrusted: its size is limited, it
can make no objects but plain data, and every fault is told with its line. Whether a
model has the tensors that a recipe names, only ``Recipe.choose`` knows.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from int8qa.build.quantization import RECIPES, Recipe, Rule
from int8qa.build.sites import TensorClass
from int8qa.errors import RecipeError

MAX_RECIPE_BYTES = 64 << 10
MAX_RULES = 1024
_NAME = re.compile(r"[a-z0-9-]+")


class _RuleModel(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    tensor_class: str | None = Field(None, alias="class")
    quantizers: str | None = Field(None, min_length=1)
    enable: bool = True
    axis: int | None = None
    bits: int = 8

    @field_validator("tensor_class")
    @classmethod
    def _check_class(cls, value: str | None) -> str | None:
        classes = [str(c) for c in TensorClass]
        if value is not None and value not in classes:
            raise ValueError(_explain_choice(value, classes))
        return value

    @field_validator("axis")
    @classmethod
    def _check_axis(cls, value: int | None) -> int | None:
        if value not in {None, 0}:
            raise ValueError("allowed: null (one scale per tensor) or 0 (one per row)")
        return value

    @field_validator("bits")
    @classmethod
    def _check_bits(cls, value: int) -> int:
        if value != 8:
            raise ValueError("allowed: 8, as the engines run INT8 and nothing narrower")
        return value

    @model_validator(mode="after")
    def _check_rule(self) -> _RuleModel:
        if (self.tensor_class is None) == (self.quantizers is None):
            found = "neither" if self.tensor_class is None else "both"
            raise ValueError(
                f"a rule has exactly one of class and quantizers; this has {found}"
            )
        if "axis" not in self.model_fields_set:
            return self
        if not self.enable:
            raise ValueError("axis says nothing where enable is false; remove one")
        if self.tensor_class and not TensorClass(self.tensor_class).is_weight:
            raise ValueError(
                f"axis is for weights; {self.tensor_class} is an activation, and "
                f"these have one scale per tensor. Remove axis"
            )
        return self

    def to_rule(self) -> Rule:
        """The rule, as recipes hold it."""
        stated = "axis" in self.model_fields_set
        return Rule(
            enable=self.enable,
            tensor_class=TensorClass(self.tensor_class) if self.tensor_class else None,
            pattern=self.quantizers,
            per_channel=self.axis is not None if stated else None,
        )


class _RecipeModel(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(max_length=64)
    base: str | None = None
    weights: Literal["per-channel", "per-tensor"] = "per-channel"
    share_qkv: bool = False
    unsigned_softmax: bool = True
    rules: list[_RuleModel] = Field(default_factory=list, max_length=MAX_RULES)

    @field_validator("name")
    @classmethod
    def _check_name(cls, value: str) -> str:
        if not _NAME.fullmatch(value):
            raise ValueError("allowed: lower-case letters, digits and -")
        if value in RECIPES:
            raise ValueError(
                "this is the name of a built-in recipe; give yours another"
            )
        return value

    @field_validator("base")
    @classmethod
    def _check_base(cls, value: str | None) -> str | None:
        if value is not None and value not in RECIPES:
            raise ValueError(_explain_choice(value, list(RECIPES)))
        return value

    @model_validator(mode="after")
    def _check_recipe(self) -> _RecipeModel:
        if self.base is None and not self.rules:
            raise ValueError("a recipe needs a base, rules, or both")
        return self


def load_recipe(name_or_path: str) -> Recipe:
    """A built-in recipe by its name, or one's own by its path.

    Args:
        name_or_path: a name of :data:`~int8qa.build.quantization.RECIPES`, or the path
            of a ``.yaml`` or ``.yml`` file.

    Raises:
        RecipeError: neither, or a file that is no recipe; the message names the file,
            the place in it, what was found and what is allowed.
    """
    built_in = RECIPES.get(name_or_path)
    if built_in is not None:
        return built_in
    path = Path(name_or_path)
    if path.suffix not in {".yaml", ".yml"}:
        raise RecipeError(
            f"no recipe is called {name_or_path!r}: "
            f"{_explain_choice(name_or_path, list(RECIPES))}; or give the path of a "
            f".yaml file"
        )
    data, lines = _parse_yaml(path, _read_file(path))
    if not isinstance(data, dict):
        raise RecipeError(
            f"{path} holds {_describe(data)}; allowed: a mapping with name and rules"
        )
    try:
        model = _RecipeModel.model_validate(data)
    except ValidationError as error:
        faults = [_explain_fault(fault, lines) for fault in error.errors()]
        more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
        raise RecipeError(f"{path}: {'; '.join(faults[:3])}{more}") from None
    base = RECIPES[model.base].rules if model.base else ()
    return Recipe(
        name=model.name,
        rules=(*base, *(rule.to_rule() for rule in model.rules)),
        per_channel=model.weights == "per-channel",
        share_qkv=model.share_qkv,
        unsigned_softmax=model.unsigned_softmax,
    )


def _read_file(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_RECIPE_BYTES + 1)
    except FileNotFoundError:
        raise RecipeError(
            f"no such recipe file: {path}. Give an existing file, or one of the "
            f"built-in recipes {', '.join(RECIPES)}"
        ) from None
    except OSError as error:
        raise RecipeError(
            f"the recipe {path} cannot be read: {error.strerror}"
        ) from error
    if len(content) > MAX_RECIPE_BYTES:
        raise RecipeError(
            f"the recipe {path} has more than {MAX_RECIPE_BYTES} bytes, which is the "
            f"most allowed; name tensor classes or patterns, not single quantizers"
        )
    return content


_Place = tuple[str | int, ...]


def _parse_yaml(path: Path, content: bytes) -> tuple[Any, dict[_Place, int]]:
    """Plain data, and the line of every place in it, from 1."""
    import yaml

    try:
        loader = yaml.SafeLoader(content)
        node = loader.get_single_node()
        lines: dict[_Place, int] = {}
        for place, part in _walk_nodes(node, ()):
            if place in lines:
                raise RecipeError(
                    f"{path}: {_join_place(place)} stands there twice, in line "
                    f"{lines[place]} and in line {part.start_mark.line + 1}; keep one"
                )
            lines[place] = part.start_mark.line + 1
        return (None if node is None else loader.construct_document(node)), lines
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise RecipeError(f"{path} is not YAML: {where}{problem}") from error
    except (RecursionError, ValueError, OverflowError) as error:
        # Nesting without end, and scalars such as the date 2024-99-99.
        raise RecipeError(
            f"{path} holds what no recipe can hold ({type(error).__name__})"
        ) from None


def _walk_nodes(node: Any, place: _Place) -> Iterator[tuple[_Place, Any]]:
    """Nodes down to the fields of a rule; deeper there is nothing to find."""
    import yaml

    if len(place) > 3:
        return
    if place:
        yield place, node
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                yield from _walk_nodes(value, (*place, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield from _walk_nodes(value, (*place, index))


def _explain_fault(fault: ErrorDetails, lines: dict[_Place, int]) -> str:
    place = fault["loc"]
    known = next(
        (place[:n] for n in range(len(place), 0, -1) if place[:n] in lines), ()
    )
    line = f" (line {lines[known]})" if known else ""
    where = f"{_join_place(place) or 'the recipe'}{line}"
    if fault["type"] == "missing":
        return f"{where} is missing"
    if fault["type"] == "extra_forbidden":
        fields = [
            field.alias or name
            for name, field in (
                _RuleModel if len(place) == 3 else _RecipeModel
            ).model_fields.items()
        ]
        return f"{where} is no field: {_explain_choice(str(place[-1]), fields)}"
    message = fault["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    found = fault["input"]
    shown = "" if isinstance(found, dict) else f" is {_describe(found)}"
    return f"{where}{shown}: {message}"


def _explain_choice(found: str, allowed: Sequence[str]) -> str:
    """What is allowed, and which of it was probably meant."""
    near = difflib.get_close_matches(found.lower(), allowed, n=1)
    meant = f" (did you mean {near[0]}?)" if near else ""
    return f"allowed: {', '.join(allowed)}{meant}"


def _describe(value: Any) -> str:
    """A scalar as it is; what could be large (a YAML alias repeats) by its kind."""
    if isinstance(value, (list, dict)):
        return "a list" if isinstance(value, list) else "a mapping"
    if value is None:
        return "nothing"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _join_place(place: Sequence[str | int]) -> str:
    return ".".join(str(part) for part in place)
