"""`polygraphy run GRAPH.onnx --latentrt`: the runner on Polygraphy's command line, found by the entry point of the package."""

from pathlib import Path

from polygraphy.tools.args import ModelArgs
from polygraphy.tools.args import util as args_util
from polygraphy.tools.args.base import BaseRunnerArgs
from polygraphy.tools.script import make_invocable

_OPTIONS = {  # of BundleRunner
    "target": "Target of the bundle; the only one by default.", "backend": "The target's own by default; torch for any.",
    "device": "auto, cpu, cuda or cuda:1.", "kernels": "auto, native or onnxruntime, on the CPU.",
}  # fmt: skip


class LatentrtRunnerArgs(BaseRunnerArgs):
    """latentrt: running a target of a bundle. The bundle is the one that the model file lies in, or --latentrt-bundle."""

    def get_name_opt_impl(self):
        return "latentrt", "latentrt"

    def add_parser_args_impl(self):
        self.group.add_argument("--latentrt-bundle", help="Folder of the bundle; that of the model by default.")
        for name, words in _OPTIONS.items():
            self.group.add_argument(f"--latentrt-{name}", help=words)

    def parse_impl(self, args):
        self.bundle = args_util.get(args, "latentrt_bundle")
        self.options = {name: args_util.get(args, f"latentrt_{name}") for name in _OPTIONS}

    def add_to_script_impl(self, script):
        from latentrt.validation.polygraphy.step_inputs import bundle_of  # imports torch, which runs without us need not

        bundle = self.bundle or str(bundle_of(Path(self.arg_groups[ModelArgs].path)).path)
        given = {name: value for name, value in self.options.items() if value is not None}
        script.add_import(imports=["BundleRunner"], frm="latentrt.validation.polygraphy.runner")
        script.add_runner(make_invocable("BundleRunner", bundle, **given))


def export_argument_groups() -> list:
    """What `polygraphy run` asks an extension for."""
    return [LatentrtRunnerArgs()]
