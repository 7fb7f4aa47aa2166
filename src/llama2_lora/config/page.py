"""The page of all settings, made from their fields."""

from __future__ import annotations

import sys
from dataclasses import MISSING, Field, fields
from typing import Any

from llama2_lora.config.settings import GROUPS
from llama2_lora.config.values import type_name


def settings_page() -> str:
    """docs/settings.md: a table for each group."""
    lines = ["# Settings", "", "*For whoever writes a config, or wonders what a variable does.*"]
    lines += ["Made by `python -m llama2_lora.config.page > docs/settings.md`: do not edit.", ""]
    lines.append("A config exports these; an empty one counts as unset. `scripts/preflight.py` checks them all at once.")
    for name, group in GROUPS.items():
        lines += ["", f"## {name.capitalize()}", "", group.__doc__ or "", "", "| variable | default | values | meaning |"]
        lines += ["| --- | --- | --- | --- |", *(_markdown_row(f) for f in fields(group))]
    return "\n".join(lines) + "\n"


def _markdown_row(f: Field[Any]) -> str:
    meta = f.metadata
    default = int(f.default) if isinstance(f.default, bool) else f.default
    shown = "required" if default is MISSING else "" if default in (None, "") else f"`{default}`"
    choices = ("0", "1") if type_name(f) == "bool" else meta["choices"]
    values = " ".join(f"`{c}`" for c in choices if c) or meta["unit"]
    return f"| `{meta['variable']}` | {shown} | {values} | {meta['doc']} |"


if __name__ == "__main__":
    sys.stdout.write(settings_page())
