"""python -m tests.benchmarks: see each command's --help."""

from pathlib import Path

from cyclopts import App

from tests.benchmarks import bombs, forward, job, layer, memory, report, scaling, stages

app = App(
    name="python -m tests.benchmarks",
    help="Benchmarks; each prints a line of JSON.",
    result_action="return_value",
)
for module in (bombs, forward, job, layer, memory, report, scaling, stages):
    app.command(module.app, name=module.__name__.rpartition(".")[2])


@app.command(name="all")
def run_all(*, peers: Path | None = None, folder: Path, vocab: Path | None = None) -> None:
    """All of them, into results/ and the README. An hour or more.

    Args:
        peers: Where the Pythons of the others are, or will be made; default: left out.
        folder: For models; kept, and not made again.
        vocab: Folder with a vocabulary; default: that of the demo.
    """
    report.save("forward", forward.main(peers=peers, folder=folder, vocab=vocab))
    report.save("layer", layer.main(folder=folder, vocab=vocab))
    report.save("job", job.main(peers=peers, folder=folder, vocab=vocab))
    report.save("memory", memory.main(folder=folder, vocab=vocab))
    report.save("stages", stages.main(folder=folder, vocab=vocab))
    report.save("scaling", scaling.main())
    report.write()


if __name__ == "__main__":
    app()
