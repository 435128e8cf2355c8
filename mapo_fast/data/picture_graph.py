"""ComfyUI's graph of nodes, from a picture's text `prompt`.

Nothing is run, and depths are limited. Only nodes that pass a text on unchanged are followed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mapo_fast.data.picture_texts import NoPromptError
from mapo_fast.util.errors import shown
from mapo_fast.util.files import parse_json

Nodes = dict[str, Any]
"""Nodes by their numbers."""
HOPS = 32
"""Most nodes between a sampler and its text."""

_ENCODERS = {
    "CLIPTextEncode": ("text",),
    "CLIPTextEncodeSDXL": ("text_g", "text_l"),
    "CLIPTextEncodeSDXLRefiner": ("text",),
}
"""ComfyUI's nodes that encode a prompt, and their inputs that hold it."""
_PASS_ON = {"ControlNetApply": "conditioning", "ControlNetApplyAdvanced": "positive"}
"""Nodes whose first output has the prompt of this input."""
_STRINGS = ("PrimitiveString", "PrimitiveStringMultiline")


def nodes_of(text: str) -> Nodes:
    """The nodes of a graph; empty where the text is not a graph.

    Raises:
        NoPromptError: it is no JSON.
    """
    try:
        graph = parse_json(text)
    except ValueError as error:
        raise NoPromptError(f"its text «prompt» is not ComfyUI's: {error}") from None
    return {str(key): node for key, node in graph.items()} if isinstance(graph, dict) else {}


def samplers(nodes: Nodes) -> Iterator[tuple[str, dict[str, Any]]]:
    """Kind and inputs of each node that samples, or guides one that does."""
    for node in nodes.values():
        kind, inputs = node_parts(node)
        if "positive" in inputs and ("latent_image" in inputs or kind == "CFGGuider"):
            yield kind, inputs


def encoded_text(nodes: Nodes, link: object) -> str:
    """The prompt that a link to a conditioning leads to.

    Raises:
        NoPromptError: it is not certain.
    """
    for _ in range(HOPS):
        (kind, inputs), output = linked(nodes, link)
        if kind in _ENCODERS:
            texts = {_string(nodes, inputs.get(name)) for name in _ENCODERS[kind]}
            if len(texts) > 1:
                raise NoPromptError("its two text encoders have different prompts")
            return texts.pop()
        if kind not in _PASS_ON or output != 0:
            break
        link = inputs.get(_PASS_ON[kind])
    raise NoPromptError(f"its prompt comes from a node that is not followed, {shown(kind)}")


def _string(nodes: Nodes, value: object) -> str:
    if not isinstance(value, str):
        (kind, inputs), _ = linked(nodes, value)
        value = inputs.get("value") if kind in _STRINGS else None
        if not isinstance(value, str):
            raise NoPromptError(f"its prompt comes from a node that is not followed, {shown(kind)}")
    return value.strip()


def linked(nodes: Nodes, link: object) -> tuple[tuple[str, dict[str, Any]], object]:
    """Kind and inputs of the node that a link leads to, and which of its outputs is meant.

    Raises:
        NoPromptError: it is no link.
    """
    if not isinstance(link, list) or len(link) != 2:
        raise NoPromptError("its graph is not as ComfyUI writes it")
    return node_parts(nodes.get(str(link[0]))), link[1]


def node_parts(node: object) -> tuple[str, dict[str, Any]]:
    """A node's kind and its inputs; empty where it is not a node."""
    if not isinstance(node, dict):
        return "", {}
    kind, inputs = node.get("class_type"), node.get("inputs")
    return kind if isinstance(kind, str) else "", inputs if isinstance(inputs, dict) else {}
