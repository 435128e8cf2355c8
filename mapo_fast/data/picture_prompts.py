"""Read the prompt that a program wrote into a generated picture.

| program      | text         | what is read                                         |
|--------------|--------------|------------------------------------------------------|
| A1111, Forge | `parameters` | all before «Negative prompt:» and «Steps:»           |
| ComfyUI      | `prompt`     | the text of the samplers' positive input             |

Where a prompt is not certain there is an error that says why.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mapo_fast.data.picture_graph import encoded_text, nodes_of, samplers
from mapo_fast.data.picture_texts import NoPromptError, a1111_parts, picture_texts


def picture_prompt(path: Path) -> str:
    """The prompt in a picture's file.

    Raises:
        NoPromptError: the picture has no prompt, or several candidates.
        MachineError: I/O failed.
    """
    return prompt_in(picture_texts(path))


def prompt_in(texts: Mapping[str, str]) -> str:
    """The prompt in a picture's texts.

    Raises:
        NoPromptError: there is none, or several candidates.
    """
    if "parameters" in texts:
        prompt = a1111_parts(texts["parameters"]).prompt
    elif "prompt" in texts:
        prompt = _of_comfyui(texts["prompt"])
    else:
        raise NoPromptError("it holds no prompt of A1111 or ComfyUI")
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise NoPromptError("its prompt is not valid Unicode") from None
    if not prompt.strip():
        raise NoPromptError("its prompt is empty")
    return prompt.strip()


def _of_comfyui(text: str) -> str:
    nodes = nodes_of(text)
    found = {encoded_text(nodes, inputs["positive"]) for _, inputs in samplers(nodes)}
    if len(found) != 1:
        raise NoPromptError("its samplers have different prompts" if found else "its graph has no sampler")
    return found.pop()
