"""What tests ask of a running ComfyUI. Each function gets ``pack`` (imports a module of the pack), what is wired, and arguments."""

import hashlib
import time
import types

import comfy.model_management
import comfy.sd
import torch
from safetensors.torch import save_file


def weights(module):
    """A hash of every weight and buffer, bit for bit."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().clone().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def state(pack, wired):
    """What must not change: weights, instance attributes of the text encoder's layers, and what is patched."""
    model, clip = wired["model"], wired["clip"]
    comfy.model_management.load_models_gpu([model, clip.patcher])
    text = clip.cond_stage_model
    return {
        "model": weights(model.model),
        "clip": weights(text),
        "overridden": sum("forward" in vars(layer) for layer in text.modules()),
        "wrapped": sum(len(getattr(layer, "weight_function", [])) for layer in model.model.modules()),
        "patcher": getattr(model.model, "current_patcher", None) is not None,
        "options": [text.clip_l.layer, text.clip_l.layer_idx],
    }


def detected(pack, wired):
    model, clip, vae = wired["model"], wired["clip"], wired["vae"]
    return {
        "class": type(model.model.model_config).__name__,
        "clip": type(clip.cond_stage_model).__name__,
        "vae": type(vae.first_stage_model).__name__,
        "scale": model.model.latent_format.scale_factor,
        "preview": len(model.model.latent_format.latent_rgb_factors),
        "inference": torch.is_inference_mode_enabled(),
    }


def registered(pack, wired):
    """How often the model class is known after the pack registered it again, under its own and under another name."""
    import importlib.util

    import comfy.supported_models
    import folder_paths

    module = pack("nodes.demo_model")
    module.register_demo_model()
    spec = importlib.util.spec_from_file_location(module.__package__ + ".again", module.__file__)
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    again.register_demo_model()
    known = [known.__name__ for known in comfy.supported_models.models]
    folders = [folder for folder in folder_paths.get_folder_paths("checkpoints") if "demo" in folder]
    return {"known": known.count("ConceptKitShapes"), "first": known[0], "folders": len(folders)}


def picture(pack, wired, prompt, negative, seed, steps, guidance, sampler, path):
    """Sample through the pack's host; latents and picture go to a file, with how far a stock latent and conditioning on the wires are."""
    sampling = pack("core.sampling")
    with pack("nodes.comfy_model").graph_model(wired["model"], wired["clip"], wired["vae"]) as model, torch.no_grad():
        noise = sampling.initial_noise([seed], model.denoiser.latent_channels, 16, 16)
        sigmas = sampling.schedule(model.denoiser, steps)
        positive, empty = model.text.encode([prompt]), model.text.encode([negative])
        latents = sampling.sample(model, positive, empty, noise, sigmas, guidance=guidance, sampler=sampler)
        pictures = model.autoencoder.decode(latents)
        again = model.autoencoder.encode(pictures)
        save_file({"latents": latents, "pictures": pictures, "encoded": again, "context": positive.context, "sigmas": sigmas}, path)
        result = {"evals": model.meter.evals, "calls": model.meter.calls, "size": float(latents.abs().max())}
        if "latent" in wired:
            result["latent"] = float((wired["latent"]["samples"] - latents).abs().max())
        if "conditioning" in wired:
            result["conditioning"] = float((wired["conditioning"][0][0] - positive.context).abs().max())
    return result


def gradients(pack, wired, word, path):
    """The gradient of a loss to a token embedding and to the conditioning."""
    with pack("nodes.comfy_model").graph_model(wired["model"], wired["clip"]) as model:
        rows = model.text.tables["l"][model.text.tokenize(word)].repeat(2, 1, 1).requires_grad_()
        conditioning = model.text.encode([["a photo of a ", {"l": rows}]])
        conditioning.context.retain_grad()
        x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)) * 3
        model.denoise(x, torch.tensor([3.0, 0.7]), conditioning).square().mean().backward()
        with torch.no_grad():
            plain = model.text.encode([f"a photo of a {word}"]).context
            table = model.text.tables["l"]
        save_file({"rows": rows.grad, "context": conditioning.context.grad, "plain": plain, "table": table}, path)
        return {"difference": float((plain - conditioning.context).abs().max().detach()), "ids": model.text.tokenize("A Photo of a café!")}


def failure(pack, wired, kind):
    """Fail inside the block; the graph must survive it."""
    with pack("nodes.comfy_model").graph_model(wired["model"], wired["clip"], wired["vae"]) as model:
        rows = model.text.tables["l"][:1].clone().requires_grad_()
        conditioning = model.text.encode([["a ", {"l": rows}]])
        x = torch.zeros(1, 4, 16, 16)
        if kind == "error":
            model.denoise(x, 1.0, conditioning)
            raise ValueError("something went wrong")
        if kind == "nan":
            model.denoise(x * torch.nan, 1.0, conditioning)
        if kind == "long":
            model.text.encode(["word " * 76])
        while kind == "forever":
            model.denoise(x, 1.0, conditioning).sum().backward()
            time.sleep(0.01)


def refused(pack, wired, what):
    """Connect something unsupported."""
    model, clip = wired["model"], wired.get("clip")
    if what == "other clip":
        demo = pack("nodes.demo_model")
        target = demo.ConceptKitShapes({"context_dim": 96}).clip_target()
        target.params["textmodel_json_config"] |= {"hidden_size": 64, "num_hidden_layers": 1}
        clip = comfy.sd.CLIP(target)
    if what == "architecture":
        model = types.SimpleNamespace(model=torch.nn.Linear(2, 2))
    if what == "refiner":
        model = model.clone()
        config = model.model.model_config
        model.model = types.SimpleNamespace(diffusion_model=model.model.diffusion_model, model_config=config, adm_channels=2560)
    with pack("nodes.comfy_model").graph_model(model, clip, wired.get("vae")):
        raise AssertionError("accepted")


def dynamic(pack, wired):
    """Where weights live in evictable memory the pack works on a copy of its own, and leaves nothing of it loaded."""
    model, clip = wired["model"].clone(), wired["clip"].clone()
    clip.patcher = clip.patcher.clone()
    for patcher in (model, clip.patcher):
        patcher.is_dynamic = lambda: True
    before = len(comfy.model_management.current_loaded_models)
    with pack("nodes.comfy_model").graph_model(model, clip) as seen:
        own = seen.denoiser._patcher.model is not model.model and seen.text._clip.cond_stage_model is not clip.cond_stage_model
        context = seen.text.encode(["a red circle"]).context.requires_grad_()
        seen.denoise(torch.zeros(1, 4, 16, 16), 1.0, pack("core.model").Conditioning(context)).sum().backward()
    return {"own": own, "gradient": float(context.grad.norm()), "left": len(comfy.model_management.current_loaded_models) - before}
