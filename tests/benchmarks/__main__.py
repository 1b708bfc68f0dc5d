"""python -m tests.benchmarks: see each command's --help."""

from cyclopts import App

from tests.benchmarks import forward

app = App(name="python -m tests.benchmarks", help="Benchmarks; each prints a line of JSON.")
app.command(forward.app, name="forward")

if __name__ == "__main__":
    app()
