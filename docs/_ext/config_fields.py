"""A directive ``config-fields``: a table of the fields of ``OrchestratorConfig``, from the source."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re

from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.statemachine import StringList

from lightning_gpuorch.config import ENVIRONMENT_PREFIX, OrchestratorConfig


def documented_fields(cls: type) -> dict[str, str]:
    """The text below each field of a dataclass, by name."""
    (definition,) = ast.parse(inspect.cleandoc(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for field, text in zip(definition.body, definition.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
        ):
            found[field.target.id] = inspect.cleandoc(str(text.value.value))
    return found


class ConfigFields(Directive):
    """One entry a field: its type, its default, its environment variable, and what it does."""

    def run(self) -> list[nodes.Node]:
        """Build the entries."""
        lines = []
        texts = documented_fields(OrchestratorConfig)
        for field in dataclasses.fields(OrchestratorConfig):
            kind = re.sub(r"\btyping\.", "", str(field.type))
            lines += [
                f"``{field.name}``",
                f"   ``{kind}``, default ``{field.default!r}``; ``{ENVIRONMENT_PREFIX}{field.name.upper()}``",
                "",
                *(f"   {line}" for line in texts[field.name].splitlines()),
                "",
            ]
        node = nodes.section()
        node.document = self.state.document
        self.state.nested_parse(StringList(lines, "config.py"), self.content_offset, node)
        return node.children


def setup(app):
    """Register the directive."""
    app.add_directive("config-fields", ConfigFields)
    return {"parallel_read_safe": True}
