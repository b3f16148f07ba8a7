# SPDX-License-Identifier: Apache-2.0
"""Show what a trained network makes on a page in the browser, and steer it there."""
import importlib.util
import os
from pathlib import Path

import click

from dnnlib import UserError, cli
from dnnlib.util import file_sha256
from inference.directions.files import load_directions
from inference.latents import mapping_sha256
from inference.page.commands import Origin
from inference.page.studio import Studio
from legacy import LoadedNetwork, load_network
from torch_utils import misc
from torch_utils.ops import dispatch
from training.watch.html_report import REPORT_FILE

#----------------------------------------------------------------------------

def find_report(loaded: LoadedNetwork) -> Path | None:
    """report.html of the run that the network comes from: beside it, or in a folder of a run further below that has the
    same network, as the demo's have."""
    folder = loaded.path.parent
    if (folder / REPORT_FILE).is_file():
        return folder / REPORT_FILE
    for path in sorted(folder.glob(f"*/*/{loaded.path.name}")):
        report = path.with_name(REPORT_FILE)
        if report.is_file() and file_sha256(path) == loaded.sha256:
            return report
    return None


def make_studio(loaded: LoadedNetwork, network: str, directions: list[str], precision: str, device: str) -> Studio:
    """What makes the pictures. Raises UserError: the directions are not of this network."""
    G = loaded.G_ema
    files, notes = load_directions(directions, G)
    options = [f"--{name}={value}" for name, value in (("precision", precision), ("device", device)) if value != "auto"]
    style_names = {name for found in files if found.styles is not None for name in found.names}
    origin = Origin(network, loaded.sha256, mapping_sha256(G), loaded.class_names, G.c_dim, directions, style_names,
                    options)
    studio = Studio(G, origin, files, precision)
    cli.tell([*notes, *studio.left_out])
    return studio

#----------------------------------------------------------------------------

@click.command(cls=cli.Command, context_settings={"max_content_width": 120})
@click.option("--network", help="Snapshot, official pickle or run folder", metavar="PKL|DIR|URL",
              type=cli.PathType(addresses=True), required=True)
@click.option("--directions", help="Files of directions, each of which gets a slider", metavar="FILE,FILE...",
              type=cli.PathList(), default="")
@click.option("--host", help="Address of this machine at which the page is shown: 127.0.0.1 is for its own browsers "
              "only, 0.0.0.0 for everybody in the network", metavar="ADDRESS", default="127.0.0.1", show_default=True)
@click.option("--port", help="Port of the page  [default: the first that is free, from 7860 on]", metavar="INT",
              type=cli.IntRange(min=1, max=65535))
@click.option("--share", help="Also show it at a public address, through Gradio's servers: who knows the address can "
              "use the network", is_flag=True)
@cli.precision_option()
@cli.device_option()
def main(network: str, directions: list[str], host: str, port: int | None, share: bool, precision: str,
         device: str) -> None:
    """Look at a trained network in the browser.

    \b
    Example:
      python visualizer.py --network=runs/demo/best_model.pkl
    """
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the page needs the package gradio: pip install gradio")
    target = misc.select_device(device)
    click.echo(dispatch.start_lines(target), err=True)
    loaded = load_network(network, target)
    studio = make_studio(loaded, network, directions, precision, device)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    from inference.page.app import Page  # These take seconds, and need a package that is an extra.
    from inference.page.server import serve
    serve(Page(studio, find_report(loaded), f"StyleSAN-XL: {loaded.path.name}"), host, port, share)


if __name__ == "__main__":
    main()
