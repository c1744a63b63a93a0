"""What tests ask of a running ComfyUI. Each function gets ``pack`` (imports a module of the pack), what is wired, and arguments."""

import hashlib
import time

import torch


def weights(module):
    """A hash of every weight and buffer, bit for bit."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().clone().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def detected(pack, wired):
    model, clip, vae = wired["model"], wired["clip"], wired["vae"]
    return {
        "class": type(model.model.model_config).__name__,
        "clip": type(clip.cond_stage_model).__name__,
        "vae": type(vae.first_stage_model).__name__,
        "scale": model.model.latent_format.scale_factor,
        "inference": torch.is_inference_mode_enabled(),
        "inference_weights": sum(p.is_inference() for p in model.model.parameters()),
    }


def gradients(pack, wired):
    graph_model = pack("nodes.comfy_model").graph_model
    before = weights(wired["model"].model), weights(wired["clip"].cond_stage_model)
    with graph_model(wired["model"], wired["clip"], wired["vae"]) as model:
        table = model.text.tables["l"]
        rows = table[model.text.tokenize("bird")].clone().requires_grad_()
        conditioning = model.text.encode([["a photo of a ", {"l": rows}]])
        x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        start = time.perf_counter()
        out = model.denoise(x, 2.0, conditioning)
        out.square().mean().backward()
        seconds = time.perf_counter() - start
        same = model.text.encode(["a photo of a bird"]).context
        difference = float((same - conditioning.context).abs().max())
    after = weights(wired["model"].model), weights(wired["clip"].cond_stage_model)
    return {"norm": float(rows.grad.norm()), "seconds": seconds, "same": difference, "unchanged": before == after}
