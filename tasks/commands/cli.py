"""The console script `dpo`. Commands import their modules when they run, so that `dpo --help` is fast."""

from pathlib import Path
from typing import Annotated

from typer import Argument, BadParameter, Option, Typer

from tasks.common.paths import REFERENCE
from tasks.common.runner import run

app = Typer(
    help="Commands of the DPO pipeline.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

TFLOPS_HELP = "Dense operations per second in bf16, TF32 and fp32, in 1e12 (default: 989 494 67, an H100)."


@app.command()
def validate(
    files: Annotated[list[str], Argument(metavar="FILE", help="Files or folders to validate.")],
    model: Annotated[Path | None, Option(help="Folder with a tokenizer (default: models/base, if any).")] = None,
    output: Annotated[Path, Option(help="Folder for report, metrics and quarantine.")] = Path("checked"),
    show: Annotated[int, Option(min=0, help="Number of pairs to print as the model reads them.")] = 0,
) -> None:
    """Validate preference data without running the pipeline."""
    from dpo.config import load_params
    from tasks.commands.validate import check_files

    check_files(load_params(), files, model, output, show)


@app.command()
def init(
    data: Annotated[str, Argument(metavar="DATA", help="File or folder of pairs in data/own.")],
    model: Annotated[
        str | None, Option(help="Folder in models/own, or a hub id (default: the default model).")
    ] = None,
    revision: Annotated[str | None, Option(help="Commit, tag or branch of a hub id (default: main).")] = None,
    force: Annotated[bool, Option("--force", help="Overwrite uncommitted changes of params.yaml.")] = False,
) -> None:
    """Write a params.yaml that fits your data and your model."""
    from tasks.commands import init as command

    command.init(data, model, revision, force=force)


@app.command()
def plan(
    model: Annotated[str | None, Option(help="Folder, hub id, or name such as llama-8b.")] = None,
    params: Annotated[Path, Option(help="Parameter file.")] = Path("params.yaml"),
    gpus: Annotated[int, Option(min=1, help="Number of GPUs.")] = 1,
    gpu_memory: Annotated[float, Option(help="GiB per GPU.")] = 80,
    pairs: Annotated[int | None, Option(help="Training pairs (default: rows of data.source).")] = None,
    prompt_tokens: Annotated[int, Option(help="Mean length of a prompt.")] = 256,
    completion_tokens: Annotated[int, Option(help="Mean length of a completion.")] = 256,
    tflops: Annotated[tuple[float, float, float] | None, Option(help=TFLOPS_HELP)] = None,
    utilisation: Annotated[float | None, Option(min=0.01, help="Share of it in training (default: 0.35).")] = None,
) -> None:
    """Estimate memory and hours of every stage on GPUs."""
    from dpo.planner import Pair
    from tasks.commands import plan as command

    speed = command.Speed(tflops or command.TFLOPS, utilisation or command.UTILISATION)
    command.plan(model, params, Pair(prompt_tokens, completion_tokens), pairs, gpus, gpu_memory, speed)


def _positive(value: float) -> float:
    if not value > 0:
        raise BadParameter("must be above 0")
    return value


@app.command()
def chat(
    policy: Annotated[Path, Argument(help="Checkpoint of a policy.")],
    reference: Annotated[Path, Option(help="Checkpoint to compare with.")] = REFERENCE,
    max_new_tokens: Annotated[int, Option(help="Maximum length of a response.")] = 128,
    temperature: Annotated[float, Option(callback=_positive, help="Sampling temperature.")] = 0.7,
    seed: Annotated[int, Option(help="Seed of the sampling.")] = 0,
) -> None:
    """Chat with a policy and its reference side by side."""
    from tasks.commands import chat as command

    command.chat(policy, reference, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)


@app.command()
def sample(
    prompts: Annotated[Path, Argument(help="File of prompts.")],
    output: Annotated[Path, Option(help="New .jsonl file for the responses.")],
    checkpoint: Annotated[Path | None, Option(help="Checkpoint to sample from (default: the champion).")] = None,
    responses: Annotated[int, Option(min=2, help="Number of responses per prompt.")] = 4,
    max_new_tokens: Annotated[int, Option(min=1, help="Maximum length of a response.")] = 128,
    seed: Annotated[int, Option(help="Seed of the sampling.")] = 0,
) -> None:
    """Sample responses to prompts, for people or a judge to rank."""
    from tasks.commands import sample as command

    command.sample(prompts, output, checkpoint, responses=responses, max_new_tokens=max_new_tokens, seed=seed)


@app.command()
def lineage(
    checkpoint: Annotated[str, Argument(help="Folder, models:/NAME/VERSION or models:/NAME@ALIAS.")],
    as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the code, data and settings of a checkpoint."""
    from tasks.commands.lineage import show

    show(checkpoint, as_json)


@app.command()
def merge(
    adapter: Annotated[Path, Argument(help="Checkpoint of a policy trained with dpo.lora.")],
    folder: Annotated[Path, Argument(help="New folder for the merged model.")],
) -> None:
    """Merge a LoRA adapter into its base model."""
    from tasks.commands import merge as command

    command.merge(adapter, folder)


@app.command()
def promote(
    check: Annotated[bool, Option("--check", help="Only check registry and number of held-out prompts.")] = False,
    champion: Annotated[str | None, Option(help="Repair the registry: set this version, or none.")] = None,
) -> None:
    """Make the selected policy the champion if it is better."""
    from tasks.commands import promote as command

    if champion is not None:
        command.set_champion(champion)
    elif check:
        command.check()
    else:
        command.promote()


@app.command()
def publish(
    trial: Annotated[str, Argument(help="Trial of the sweep, such as sigmoid-0.1-7e-05-17.")],
    repo: Annotated[str, Argument(help="Repository on the hub, as USER/NAME.")],
    public: Annotated[
        bool, Option("--public", help="Create a public repository (default: a private one).")
    ] = False,
    license: Annotated[
        str | None, Option(help="Licence on the model card, as an identifier of the hub, such as apache-2.0.")
    ] = None,
    gguf: Annotated[bool, Option("--gguf", help="Add a GGUF file; needs llama.cpp.")] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Write the folder, upload nothing.")] = False,
) -> None:
    """Upload a policy with its model card to the hub."""
    from tasks.commands import publish as command

    command.publish(trial, repo, private=not public, dry_run=dry_run, license=license, gguf=gguf)


@app.command()
def tune(
    trials: Annotated[int, Option(min=1, help="Number of trials of the search.")] = 20,
    losses: Annotated[
        list[str] | None, Option("--loss", help="A loss to try, repeatable (default: sweep.losses).")
    ] = None,
    betas: Annotated[tuple[float, float] | None, Option(help="Least and greatest beta.")] = None,
    learning_rates: Annotated[tuple[float, float] | None, Option(help="Least and greatest learning rate.")] = None,
    name: Annotated[str, Option(help="Name of the search; the same name continues it.")] = "tune",
) -> None:
    """Search for a loss, beta and learning rate, one experiment of DVC per trial."""
    from tasks.commands import tune as command

    command.tune(name, trials, losses or [], betas, learning_rates)


@app.command()
def results() -> None:
    """Print the comparison of all policies."""
    from tasks.commands.results import show

    show()


@app.command()
def sync() -> None:
    """Upload to MLflow what was logged offline."""
    from tasks.tracking.offline import connect

    connect()


def main() -> None:
    """Run the console script `dpo`."""
    run(lambda: app(prog_name="dpo"))


if __name__ == "__main__":
    main()
