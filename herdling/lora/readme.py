"""The README.md of an adapter folder: what it belongs to, what it reaches, what its licence asks for."""

from torch import nn

from herdling.lora.coverage import table


def readme(
    model: nn.Module,
    title: str,
    base: str,
    *,
    how: str = "",
    on_hub: bool = False,
    duties: str | None = None,
) -> str:
    """Text with the hub's metadata block.

    Args:
        model: with the adapter on it.
        base: folder or hub name of the model that it belongs to; the block names it if `on_hub`.
        how: a sentence on how it came about.
        duties: what the base model's licence asks for, if it asks for something.
    """
    block = ["library_name: peft", "tags: [llama4, herdling, lora]"]
    if on_hub:
        block.append(f"base_model: {base}")
    if duties:
        block += ["license: other", "license_name: llama4"]
    parts = [
        "\n".join(["---", *block, "---"]),
        f"# {title}",
        f"A LoRA adapter of `{base}` in peft's format. {how}".strip(),
        f"```\n{table(model)}\n```",
    ]
    if duties:
        parts += ["**Built with Llama**", f"{duties[0].upper()}{duties[1:]}."]
    return "\n\n".join(parts) + "\n"
