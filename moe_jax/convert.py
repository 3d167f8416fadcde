"""Converts BART, T5 and mT5 from Hugging Face or T5X, and runs to Hugging Face or T5X.

    python -m moe_jax.convert from-hf DIR OUT
    python -m moe_jax.convert from-t5x CHECKPOINT_DIR OUT [--sentencepiece FILE]
    python -m moe_jax.convert to-hf MODEL_DIR OUT --task NAME [--average] [--approximate]
    python -m moe_jax.convert to-t5x MODEL_DIR OUT

`from-hf` writes a model directory with its tokenizer. A run can start from it:

    python -m moe_jax.train --gin_file=OUT/config.gin --gin_file=runs/skills_gym_stage1.gin \\
        --gin.ModelConfig.experts=3 --gin.INITIAL_CHECKPOINT_PATH=OUT --gin.MODEL_DIR=...

`from-t5x` does the same with a checkpoint of T5X. Such a checkpoint holds no tokenizer: give its
SentencePiece model here, or choose a vocabulary in `train` (VocabularyConfig).

It also reads what T5X trained by `t5x/train.gin` (docs/t5x.md); `to-t5x` writes a checkpoint that
T5X goes on from.

`to-hf` takes one task's expert in every layer and writes a plain model that `transformers` loads.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import jax

from moe_jax.core.ending import one_line
from moe_jax.data import vocabulary
from moe_jax.data.modules import give, load_module
from moe_jax.interop.hf_read import from_hf
from moe_jax.interop.hf_write import to_hf
from moe_jax.interop.t5x_read import from_t5x
from moe_jax.interop.t5x_run import write_run


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line, converts, and says what was made."""
    parser = argparse.ArgumentParser(
        prog="python -m moe_jax.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument(
        "--modules",
        default="",
        metavar="MODULE,...",
        help="the run's extensions, and what makes its vocabulary; its files alone import nothing",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    reader = commands.add_parser("from-hf", help="read a Hugging Face model and its tokenizer")
    reader.add_argument("source", metavar="DIR", help="Hugging Face directory, or name on the Hub")
    reader.add_argument("out", metavar="OUT", help="model directory to write")
    t5x = commands.add_parser(
        "from-t5x", parents=[own], help="read a T5X checkpoint of T5, mT5 or a TaskMoE"
    )
    t5x.add_argument(
        "source", metavar="CHECKPOINT_DIR", help="local directory, such as checkpoint_1000000"
    )
    t5x.add_argument("out", metavar="OUT", help="model directory to write")
    t5x.add_argument("--sentencepiece", metavar="FILE", help="the model's tokenizer")
    writer = commands.add_parser("to-hf", parents=[own], help="write a task's plain model")
    writer.add_argument("checkpoint", metavar="MODEL_DIR", help="or one of its checkpoints")
    writer.add_argument("out", metavar="OUT", help="Hugging Face directory to write")
    writer.add_argument("--task", metavar="NAME", help="the task whose experts are taken")
    writer.add_argument(
        "--average",
        action="store_true",
        help="average the experts' parameters, weighted by the task's route or,"
        " without --task, equally",
    )
    writer.add_argument(
        "--approximate",
        action="store_true",
        help="for a soft route, take the largest expert and print the error of doing so",
    )
    to_t5x = commands.add_parser("to-t5x", parents=[own], help="write a checkpoint for T5X")
    to_t5x.add_argument("checkpoint", metavar="MODEL_DIR", help="or one of its checkpoints")
    to_t5x.add_argument("out", metavar="OUT", help="T5X's MODEL_DIR, where checkpoint_STEP is made")
    args = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")  # leaves the accelerator to training processes
    names = list(filter(None, args.modules.split(","))) if "modules" in args else []
    give(names, "--modules")
    for name in names:
        load_module(name)
    if args.command == "to-hf":
        flags = {"average": args.average, "approximate": args.approximate}
        print(to_hf(args.checkpoint, args.out, args.task, **flags))
    elif args.command == "to-t5x":
        print(write_run(args.checkpoint, args.out))
    else:
        if args.command == "from-hf":
            config, note = from_hf(args.source, args.out), ""
        else:
            config = from_t5x(args.source, args.out, args.sentencepiece)
            known = (Path(args.out) / vocabulary.DIRECTORY).is_dir()
            note = "" if known else "; no tokenizer: train needs a VocabularyConfig"
        print(f"{args.out}: {config.architecture}, d_model {config.d_model},"
              f" {config.encoder_layers} + {config.decoder_layers} layers{note}")  # fmt: skip


if __name__ == "__main__":
    with one_line():
        main()
