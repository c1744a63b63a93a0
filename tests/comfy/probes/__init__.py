"""A test-only pack: one node that runs a function of ``probes.py`` where nodes run, on what is wired to it."""

import importlib
import json
import sys

from comfy_api.v0_0_2 import ComfyExtension, io


class Probe(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ConceptKitProbe",
            inputs=[
                io.String.Input("name"),
                io.String.Input("arguments"),
                io.String.Input("nonce"),
                io.Model.Input("model", optional=True),
                io.Clip.Input("clip", optional=True),
                io.Vae.Input("vae", optional=True),
                io.Latent.Input("latent", optional=True),
                io.Conditioning.Input("conditioning", optional=True),
                io.Custom("CONCEPTKIT_SCORER").Input("scorer", optional=True),
                io.Custom("CONCEPTKIT_DECOMPOSITION").Input("decomposition", optional=True),
            ],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, name, arguments, nonce, **wired):
        pack = next(name for name in sys.modules if name.endswith(".nodes.demo_model")).removesuffix(".nodes.demo_model")
        probes = importlib.import_module(f"{__name__}.probes")
        result = getattr(probes, name)(lambda module: importlib.import_module(f"{pack}.{module}"), wired, **json.loads(arguments))
        return io.NodeOutput(ui={"text": [json.dumps(result)]})


class Probes(ComfyExtension):
    async def get_node_list(self):
        return [Probe]


async def comfy_entrypoint():
    return Probes()
