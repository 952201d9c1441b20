"""The whole life of a tiny multimodal model, on this machine and on data it already has.

    herdling demo [--out runs/demo]        then: herdling chat runs/demo/model

Tokenizer, joint text and image pretraining, instruction tuning, online RL on tasks that grade
themselves, a light pass of preference training, and after each stage an examination on held-out items;
then a report. Stopped at any moment, the same command goes on where it was. Left out: everything that
would take longer than a coffee (long context, quantization). What each stage does is in demo_stages.
"""

from herdling.recipes.demo_stages import Config

__all__ = ["Config", "main"]


def main(config: Config) -> int:
    from herdling.recipes.demo_run import run

    run(config)
    return 0
