"""The context folder of a NeMo checkpoint: io.json (fiddle's JSON of the objects to build), model.yaml, tokenizer.

Written without NeMo, from one tree of `Node`s, so that a conversion needs neither its imports (10 s) nor a model.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from llama2_lora.findings import one_line
from llama2_lora.llama2 import LlamaShape

if TYPE_CHECKING:
    from llama2_lora.weights.huggingface import HFModel

TOKENIZER = "nemo_tokenizer"
TORCH_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Name:
    """A Python object by its module and name."""

    module: str
    name: str


@dataclass(frozen=True)
class Node:
    """A call of `target` with named arguments: NeMo builds the object when it loads the context."""

    target: Name
    arguments: dict[str, Any]


def write_context(folder: Path, source: HFModel, provenance: dict[str, Any]) -> None:
    """Write the context of a checkpoint made from `source`; provenance is kept in io.json."""
    (folder / TOKENIZER).mkdir(parents=True)
    for file in source.tokenizer_files:
        shutil.copyfile(file, folder / TOKENIZER / file.name)
    model = _model(source)
    strategy = Node(
        Name("nemo.lightning.pytorch.strategies.megatron_strategy", "MegatronStrategy"), {"ckpt_save_optimizer": False}
    )
    trainer = Node(
        Name("nemo.lightning.pytorch.trainer", "Trainer"), {"accelerator": "cpu", "devices": 1, "strategy": strategy}
    )
    root = Node(
        Name("nemo.lightning.io.pl", "TrainerContext"),
        {"model": model, "trainer": trainer, "extra": {"source": json.dumps(provenance)}},
    )
    (folder / "model.yaml").write_text(yaml.safe_dump(_plain(model)))
    (folder / "io.json").write_text(json.dumps(_FiddleJSON().document(root)))  # last: with it the context is complete


def read_provenance(folder: Path) -> dict[str, Any] | None:
    """What write_context was given; None where another program wrote the context."""
    try:
        objects = json.loads((folder / "io.json").read_text())["objects"]
        for item in (item for entry in objects.values() for item in entry["items"]):
            if item[0] == "Key(key='source')":
                return json.loads(item[1]["value"])
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        pass
    return None


def read_model_yaml(folder: Path) -> tuple[LlamaShape, bool]:
    """The model's shape, and whether the file knew the vocabulary (else it is 0). ValueError where it is no Llama."""
    path = folder / "model.yaml"
    try:
        config = yaml.safe_load(path.read_text())["config"]
        shape = LlamaShape(
            layers=config["num_layers"],
            hidden=config["hidden_size"],
            ffn=config["ffn_hidden_size"],
            heads=config["num_attention_heads"],
            kv_groups=config["num_query_groups"] or config["num_attention_heads"],
            vocab=config.get("vocab_size") or 0,
            max_positions=config["seq_length"],
            norm_eps=config["layernorm_epsilon"],
            rope_base=config["rotary_base"],
            tied=config["share_embeddings_and_output_weights"],
        )
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: this is no NeMo checkpoint, or its download is not complete") from None
    except Exception as error:  # of many types: what yaml and wrong values raise
        text = one_line(f"{type(error).__name__} {error}", limit=300)
        raise ValueError(f"{path} does not describe a Llama model: {text}") from None
    return shape, bool(shape.vocab)


def _model(source: HFModel) -> Node:
    shape, dtype = source.shape, TORCH_DTYPES[source.dtype]
    config = {
        "num_layers": shape.layers,
        "hidden_size": shape.hidden,
        "ffn_hidden_size": shape.ffn,
        "num_attention_heads": shape.heads,
        "num_query_groups": shape.kv_groups,
        "kv_channels": shape.head_dim,
        "init_method_std": source.config.get("initializer_range", 0.02),
        "layernorm_epsilon": shape.norm_eps,
        "seq_length": shape.max_positions,
        "rotary_base": shape.rope_base,
        "gated_linear_unit": True,
        "make_vocab_size_divisible_by": min(128, shape.vocab & -shape.vocab),
        "share_embeddings_and_output_weights": shape.tied,
        "fp16": dtype == "float16",
        "bf16": dtype == "bfloat16",
        "params_dtype": Name("torch", dtype),
        "vocab_size": shape.vocab,
    }
    llama = "nemo.collections.llm.gpt.model.llama"
    tokenizer = Name("nemo.collections.common.tokenizers.huggingface.auto_tokenizer", "AutoTokenizer")
    return Node(
        Name(llama, "LlamaModel"),
        {
            "config": Node(Name(llama, "LlamaConfig"), config),
            "tokenizer": Node(tokenizer, {"pretrained_model_name": TOKENIZER}),
        },
    )


def _plain(value: Any) -> Any:
    """model.yaml's form: dictionaries that name what they stand for."""
    if isinstance(value, Node):
        target = f"{value.target.module}.{value.target.name}"
        return {"_target_": target} | {name: _plain(argument) for name, argument in value.arguments.items()}
    if isinstance(value, Name):
        return {"_target_": f"{value.module}.{value.name}", "_call_": False}
    return value


class _FiddleJSON:
    """fiddle.experimental.serialization, version 0.0.1: every container is an object of its own, with its paths."""

    def __init__(self) -> None:
        self.objects: dict[str, Any] = {}

    def document(self, root: Node) -> dict[str, Any]:
        reference = self._value(root, "<root>")
        return {"root": reference, "objects": self.objects, "refcounts": dict.fromkeys(self.objects, 1), "version": "0.0.1"}

    def _value(self, value: Any, path: str) -> dict[str, Any]:
        if isinstance(value, Node):
            return self._node(value, path)
        if isinstance(value, dict):
            return self._dict(value, path)
        if isinstance(value, Name):
            return self._pyref(value) | {"paths": [path]}
        return {"type": "leaf", "value": value, "paths": [path]}

    def _node(self, node: Node, path: str) -> dict[str, Any]:
        items = [[f"Attr(name='{k}')", self._value(v, f"{path}.{k}")] for k, v in node.arguments.items()]
        metadata_type = self._pyref(Name("fiddle._src.config", "BuildableTraverserMetadata"))
        metadata_items = [
            ["Attr(name='fn_or_cls')", self._pyref(node.target)],
            ["Attr(name='argument_names')", self._tuple(list(node.arguments))],
            ["Attr(name='argument_tags')", self._dict({})],
            ["Attr(name='argument_history')", self._dict({})],
        ]
        metadata = self._add({"type": metadata_type, "items": metadata_items, "metadata": metadata_type})
        entry = {"type": self._pyref(Name("fiddle._src.config", "Config")), "items": items, "metadata": metadata}
        return self._add(entry | {"paths": [path]})

    def _tuple(self, values: list[str]) -> dict[str, Any]:
        items = [[f"Index(index={i})", value] for i, value in enumerate(values)]
        return self._add({"type": self._pyref(Name("builtins", "tuple")), "items": items, "metadata": None})

    def _dict(self, values: dict[str, Any], path: str | None = None) -> dict[str, Any]:
        tuple_type = self._pyref(Name("builtins", "tuple"))
        items = [[f"Key(key={k!r})", self._value(v, f"{path}[{k!r}]")] for k, v in values.items()]
        keys = self._tuple(list(values)) if values else {"type": tuple_type, "items": [], "metadata": None}
        entry = {"type": self._pyref(Name("builtins", "dict")), "items": items, "metadata": keys}
        return self._add(entry | ({"paths": [path]} if path else {}))

    def _pyref(self, name: Name) -> dict[str, Any]:
        return {"type": "pyref", "module": name.module, "name": name.name}

    def _add(self, entry: dict[str, Any]) -> dict[str, Any]:
        key = f"{entry['type']['name'].lower()}_{len(self.objects) + 1}"
        self.objects[key] = entry
        return {"type": "ref", "key": key}
