"""Images and texts from a checkpoint.

Examples:
    symbiotic generate image --run outputs/debug --prompt "a red circle" --out outputs/images
    symbiotic generate text  --checkpoint outputs/debug/checkpoint/step-400 \\
                            --prompt "Which digit is this?" --image seven.png --out outputs/texts

--run takes the newest complete checkpoint of a run. The config is the one that the run kept, unless --config names another; with
--config alone the run is that of its job.dump_folder. Options of the config may follow, as --section.key value. What is drawn for a
prompt depends on --seed and on its number. --weights ema generates with the average of the weights that a run kept, see [ema].

torchrun spreads a model that is too large for one device over several processes, as the config says.

image writes one PNG per prompt, 0000.png and so on, with prompt, seed and settings in its text chunks. text prints what the model
answers (--plain: how it goes on) and writes texts.jsonl.
"""

import argparse
import json
from pathlib import Path

from PIL import Image

from symbiotic_titan.config.optimizer import WEIGHTS
from symbiotic_titan.config.saved import saved_config
from symbiotic_titan.data.decoding import DECODE_ERRORS, decode_image
from symbiotic_titan.data.image_files import read_picture
from symbiotic_titan.data.images import ImageSizeError
from symbiotic_titan.flow.solver import SOLVERS
from symbiotic_titan.inference.generator import Generator
from symbiotic_titan.process import Counter, exit_status, is_first_process


def prompts_of(options: argparse.Namespace) -> list[str]:
    """The prompts of the command line, then those of the file, one per line; empty lines are left out.

    Raises:
        ValueError: there is none.
    """
    prompts = list(options.prompt)
    if options.prompts_file is not None:
        lines = options.prompts_file.read_text(encoding="utf-8").splitlines()
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError("no prompt; give --prompt TEXT or --prompts-file FILE")
    return prompts


def open_image(path: Path) -> Image.Image:
    """The image of the file ``path``, as training sees it.

    Raises:
        ValueError: it cannot be read, or is no image.
    """
    try:
        return decode_image(read_picture(str(path)))
    except (*DECODE_ERRORS, ImageSizeError) as error:
        raise ValueError(f"--image {path}: cannot be read as an image ({error})") from error


def generate_images(generator: Generator, prompts: list[str], options: argparse.Namespace) -> None:
    pictures = generator.images(
        prompts,
        steps=options.steps,
        guidance=options.guidance,
        sampler=options.sampler,
        shift=options.shift,
        seed=options.seed,
        size=tuple(options.size) if options.size else None,
        aspect=options.aspect,
        batch_size=options.batch_size,
        advance=Counter("image steps", len(prompts) * options.steps),
    )
    if not is_first_process():
        return
    options.out.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(pictures):
        path = options.out / f"{number:04d}.png"
        picture.save(path)
        print(f"{path}: {picture.settings['prompt']}")


def generate_texts(generator: Generator, prompts: list[str], options: argparse.Namespace) -> None:
    shown = [open_image(path) for path in options.image]
    completions = generator.text(
        prompts,
        [shown] * len(prompts),
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        stop=options.stop,
        seed=options.seed,
        conversation=not options.plain,
        batch_size=options.batch_size,
        progress=Counter,
    )
    if not is_first_process():
        return
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "texts.jsonl").open("w", encoding="utf-8") as file:
        for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            row = {"index": number, "prompt": prompt, "text": completion.text}
            row |= {"ending": completion.ending, "tokens": len(completion.ids)}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            print(f"{prompt}\n  {completion.text}")


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The tool's own options, and the others, which are the config's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="image|text")
    image = kinds.add_parser("image", help="images of captions")
    text = kinds.add_parser("text", help="answers, or continuations of texts")
    for part in (image, text):
        part.add_argument("--config", help="TOML file; default: the config that the run kept")
        where = part.add_mutually_exclusive_group()
        where.add_argument("--checkpoint", type=Path, help="its folder, .../step-N")
        where.add_argument("--run", type=Path, help="folder of a run; its newest checkpoint")
        part.add_argument("--weights", choices=WEIGHTS, default="trained", help="ema: see [ema]")
        part.add_argument(
            "--prompt", action="append", default=[], help="may be given several times"
        )
        part.add_argument("--prompts-file", type=Path, help="a prompt per line")
        part.add_argument("--out", required=True, type=Path, help="folder to write into")
        part.add_argument("--seed", type=int, default=0)
        part.add_argument("--batch-size", type=int, default=8, help="prompts at a time (default 8)")
        part.add_argument("--uncached", action="store_true", help="no key-value cache: slow")
    image.add_argument("--steps", type=int, default=50, help="of the sampler (default 50)")
    image.add_argument("--guidance", type=float, default=3.0, help="1: none (default 3)")
    # No choices: the module that registers another sampler is imported later, with the config.
    samplers = f"{', '.join(SOLVERS)}, or a registered one (default %(default)s)"
    image.add_argument("--sampler", default="euler", help=samplers)
    image.add_argument("--shift", type=float, help="of the timesteps (default: [flow]'s)")
    size = image.add_mutually_exclusive_group()
    size.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="of a bucket")
    size.add_argument("--aspect", help="width:height; the nearest bucket (default 1:1)")
    text.add_argument("--image", type=Path, action="append", default=[], help="shown with each")
    text.add_argument("--max-tokens", type=int, default=256)
    text.add_argument("--temperature", type=float, default=0.0, help="0: greedy (default)")
    text.add_argument("--top-p", type=float, default=1.0)
    text.add_argument("--stop", action="append", default=[], help="a string that ends a text")
    text.add_argument("--plain", action="store_true", help="no turns: go on with the prompt")
    return parser.parse_known_args(arguments)


def run(options: argparse.Namespace, overrides: list[str]) -> None:
    """Raises ValueError for a user's mistake."""
    prompts = prompts_of(options)
    trained = options.checkpoint or options.run
    if trained is None and options.config is None:
        raise ValueError("no model; give --run, --checkpoint or --config")
    generator = Generator.load(
        options.config or saved_config(trained, overrides),
        trained,
        overrides,
        cached=not options.uncached,
        weights=options.weights,
    )
    act = generate_images if options.kind == "image" else generate_texts
    act(generator, prompts, options)


def main(arguments: list[str] | None = None) -> int:
    options, overrides = parse(arguments)
    return exit_status(lambda: run(options, overrides))
