"""Commands that plan and generate datasets."""

import logging
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from madgen.cli.arguments import AsJson, JobArguments, Measured, Output, announce_loading, as_utf8, load_job, option

logger = logging.getLogger(__name__)
resource_option = partial(option, panel="Resources")
slurm_option = partial(option, panel="SLURM options")
picture_option = partial(option, panel="Pictures")


def generate(job: JobArguments) -> None:
    """Generate a dataset, or resume an unfinished one.

    Finished samples are kept: rerun the same command after any interruption,
    or start it on several machines at once to share the work.

    Examples:

        madgen generate jobs/demo.yaml
        madgen generate jobs/alps.yaml sampling.width=4096 output.dir=out/wide
        torchrun --nproc-per-node 8 -m madgen generate jobs/alps.yaml
    """
    from madgen.cluster.signals import exit_before_start

    exit_before_start()
    loaded = load_job(job)
    from madgen.generation.outcome import finished, report
    from madgen.generation.upload import finish_upload
    from madgen.planning.resolved_run import ResolvedRun

    resolved = ResolvedRun.of(loaded)
    outcome = finished(resolved)
    if outcome is not None:
        outcome = finish_upload(resolved, outcome)
    else:
        from madgen.planning.forecast import forecast
        from madgen.planning.forecast_text import warn

        warn(resolved, forecast(resolved))  # refuse impossible jobs before the import of Lightning, which takes seconds
        resolved.check_directory()
        announce_loading(loaded)
        from madgen.generation.run import generate as run

        outcome = run(resolved)
    report(outcome, resolved)
    sys.exit(outcome.code)


def plan(
    job: JobArguments,
    workers: Annotated[int | None, option("N", "Estimate the wall time for N devices.", min=1)] = None,
    measured: Measured = None,
    as_json: AsJson = False,
) -> None:
    """Show the prompts, samples, shards, cost, disk space and time of a job.

    Writes nothing. Runs the checks of `madgen generate` that need no weights, and
    fails where that would fail; a note says which weights `madgen fetch` downloads.

    Examples:

        madgen plan jobs/demo.yaml
        madgen plan jobs/alps.yaml --workers 32 --measured /scratch/alps-trial
    """
    loaded = load_job(job)
    from madgen.generation.upload import check_upload_target
    from madgen.planning.forecast import forecast
    from madgen.planning.forecast_text import print_forecast, warn
    from madgen.planning.resolved_run import ResolvedRun
    from madgen.planning.wall_time import estimate

    resolved = ResolvedRun.of(loaded)
    expected = forecast(resolved, assume_spec=True)
    resolved.check_directory()
    check_upload_target(resolved)
    remaining = estimate(expected.shapes, measured)
    print_forecast(resolved, expected, remaining.as_dict(workers), as_json)
    warn(resolved, expected)


def sample(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text that describes the panorama.")],
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PRESET|KEY=VALUE]", help="Presets such as fast, and overrides such as sampling.width=1536."
        ),
    ] = None,
    output: Output = Path("panorama.png"),
    job: Annotated[
        Path | None, option("FILE", "Job file to take the settings from.", shown="the demo backbone with MAD")
    ] = None,
    seed: Annotated[int | None, option("N", "Seed of the panorama; the same as prompts.seed=N.")] = None,
    num: Annotated[
        int, option("N", "Panoramas to generate, with consecutive seeds: FILE-1, FILE-2, ...", "-n", "--num", min=1)
    ] = 1,
    image: Annotated[str | None, picture_option("FILE|URL", "Picture to start from instead of noise.")] = None,
    mask: Annotated[str | None, picture_option("FILE|URL", "Picture that is white where the image is kept.")] = None,
    strength: Annotated[
        float | None,
        picture_option(
            "0..1", "Share of the denoising steps that redraw the image.", shown="0.8; 1 with --mask or --place"
        ),
    ] = None,
    scale: Annotated[float | None, picture_option("FACTOR", "Enlarge the image by this factor first.")] = None,
    place: Annotated[
        str | None, picture_option("LEFT,TOP|center", "Place of the image on a larger panorama, in px.")
    ] = None,
    control: Annotated[str | None, picture_option("FILE|URL", "Picture that the ControlNet follows.")] = None,
    style: Annotated[str | None, picture_option("FILE|URL", "Picture that the IP-Adapter follows.")] = None,
) -> None:
    """Generate a single panorama, or several with consecutive seeds.

    Examples:

        madgen sample "mountains over a meadow at noon" -o noon.png
        madgen sample "a foggy lake" sampling.width=1536 --seed 7 -n 4
        madgen sample "a foggy lake" multidiffusion -o without-mad.png
        madgen sample "a glacier" --job jobs/alps.yaml -o glacier.webp
        madgen sample "a foggy lake" --image noon.png --scale 2 --strength 0.35
    """
    from madgen.generation.picture_options import PictureOptions
    from madgen.generation.single_image import check_output, numbered

    files = {"image": image, "mask": mask, "control": control, "style": style}
    options = PictureOptions(files, strength, scale, place)
    given = [as_utf8(word) for word in words or []]
    loaded = options.load_job(job, given, seed)
    check_output(output)
    panorama = options.prompt(as_utf8(prompt), loaded, given)
    announce_loading(loaded)
    from madgen.generation.sample import sample_panoramas

    sample_panoramas(panorama, numbered(output, num), loaded)


def submit(
    job: JobArguments,
    nodes: Annotated[str, resource_option("N|auto", "Number of nodes; auto: the fewest that --time allows.")] = "1",
    gpus_per_node: Annotated[int | None, resource_option("N", "GPUs per node, with one process each.")] = None,
    tasks_per_node: Annotated[int | None, resource_option("N", "Processes per node, on CPU nodes.")] = None,
    cpus_per_task: Annotated[int | None, resource_option("N", "CPU cores per process.", shown="8")] = None,
    time: Annotated[
        str | None, resource_option("HH:MM:SS|auto", "Time limit; auto: estimated as by `madgen plan`.")
    ] = None,
    measured: Measured = None,
    array: Annotated[
        str | None,
        resource_option(
            "0-63[%K]", "Submit independent array tasks (at most K at once) instead of one multi-node job."
        ),
    ] = None,
    partition: Annotated[str | None, slurm_option("NAME", "Partition to submit to.")] = None,
    account: Annotated[str | None, slurm_option("NAME", "Account to charge.")] = None,
    qos: Annotated[str | None, slurm_option("NAME", "Quality of service.")] = None,
    sbatch: Annotated[
        list[str] | None,
        slurm_option("OPTION", "Any other option of sbatch, such as --sbatch=--exclusive (repeatable)."),
    ] = None,
    env: Annotated[Path | None, option("FILE", "Shell script to source first; see slurm/env.example.sh.")] = None,
    chain: Annotated[int, option("N", "Submit N dependent jobs in sequence.", min=1)] = 1,
    dry_run: Annotated[bool, option(None, "Print the script without submitting it.", "--dry-run")] = False,
) -> None:
    """Render the sbatch script of a job, print it and submit it.

    Examples:

        madgen submit jobs/alps.yaml --nodes 4 --gpus-per-node 8 --time 24:00:00
        madgen submit jobs/alps.yaml --array 0-63%16 --gpus-per-node 1 --chain 5
        madgen submit jobs/alps.yaml --time auto --measured out/trial --dry-run
    """
    loaded = load_job(job)
    from madgen.cluster import sbatch as slurm
    from madgen.planning.forecast import forecast
    from madgen.planning.resolved_run import ResolvedRun
    from madgen.planning.sizing import AUTO, parse_count

    node_count = parse_count("--nodes", nodes)
    named = {"partition": partition, "account": account, "qos": qos}
    resources = slurm.Resources(
        nodes=1 if node_count is None else node_count,
        tasks_per_node=tasks_per_node,
        gpus_per_node=gpus_per_node,
        cpus_per_task=cpus_per_task,
        time=None if time == AUTO else time,
        array=array,
        options=[*(f"--{name}={value}" for name, value in named.items() if value is not None), *(sbatch or [])],
    )
    slurm.check(loaded, resources)
    resolved = ResolvedRun.of(loaded)
    expected = forecast(resolved)
    if AUTO in (nodes, time):
        from madgen.planning.sizing import choose_resources
        from madgen.planning.wall_time import estimate

        resources, why = choose_resources(resources, estimate(expected.shapes, measured), nodes, time)
        logger.warning(why)
    script = slurm.render(loaded, job, resources, env)
    resolved.check_directory()
    if not dry_run:
        slurm.require_sbatch()
    print(script, end="")
    if note := slurm.idle_workers(resolved.plan.shard_count, resources.workers):
        logger.info(note)
    if not dry_run:
        logger.info(slurm.next_commands(loaded, slurm.submit(script, chain), array is not None))


def fetch(
    job: JobArguments,
    extractor: Annotated[
        str | None, option("paper|...", "Also download the networks of `madgen evaluate --extractor`.")
    ] = None,
) -> None:
    """Download the weights that a job needs, for compute nodes without network access.

    Examples:

        madgen fetch jobs/alps.yaml
        madgen fetch jobs/alps.yaml --extractor paper
    """
    from madgen.generation.fetch import fetch as run
    from madgen.generation.fetch import fetch_networks

    run(load_job(job))
    if extractor is not None:
        fetch_networks(extractor)
