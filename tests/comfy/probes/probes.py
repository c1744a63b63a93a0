"""What tests ask of a running ComfyUI. Each function gets ``pack`` (imports a module of the pack), what is wired, and arguments."""

import contextlib
import copy
import gc
import hashlib
import json
import random
import time
import types
from pathlib import Path

import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import numpy as np
import torch
from safetensors.torch import load_file, save_file


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
        "overridden": sum(overridden(layer) for part in (text, model.model) for layer in part.modules()),
        "wrapped": sum(len(getattr(layer, "weight_function", [])) for layer in model.model.modules()),
        "patcher": getattr(model.model, "current_patcher", None) is not None,
        "options": [text.clip_l.layer, text.clip_l.layer_idx],
    }


def overridden(layer):
    """Whether a layer's forward is not its class's. ComfyUI leaves the class's own behind on a layer that had a bypassed LoRA."""
    return "forward" in vars(layer) and getattr(layer.forward, "__func__", None) is not type(layer).forward


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

    module = pack("nodes.demo_model")
    module.register_demo_model()
    spec = importlib.util.spec_from_file_location(module.__package__ + ".again", module.__file__)
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    again.register_demo_model()
    known = [known.__name__ for known in comfy.supported_models.models]
    folders = [folder for folder in folder_paths.get_folder_paths("checkpoints") if "demo" in folder]
    return {"known": known.count("ConceptKitShapes"), "first": known[0], "folders": len(folders)}


def previews(pack, wired):
    """What ComfyUI is told while the pack samples: step, total, and the size of the preview."""
    import latent_preview

    hook, method, told = comfy.utils.PROGRESS_BAR_HOOK, latent_preview.args.preview_method, []
    comfy.utils.set_progress_bar_global_hook(
        lambda value, total, preview, node_id=None: told.append([value, total, preview and preview[1].size, node_id])
    )
    latent_preview.set_preview_method("latent2rgb")
    try:
        module, sampling = pack("nodes.comfy"), pack("core.sampling")
        progress = module.Progress("7", wired["model"], "circle")
        progress.EVERY = 0
        with module.graph_model(wired["model"], wired["clip"], on_denoised=progress.show) as model, torch.no_grad():
            noise, sigmas = sampling.initial_noise([0], 4, 16, 16), sampling.schedule(model.denoiser, 3)
            sampling.sample(model, model.text.encode(["a circle"]), None, noise, sigmas, guidance=1, on_step=progress)
    finally:
        comfy.utils.set_progress_bar_global_hook(hook)
        latent_preview.args.preview_method = method
    return told


def messages(pack, wired, steps, seconds, label):
    """What a node writes under itself while steps are reported evenly, then the last one ten times more; and a long text."""
    from server import PromptServer

    module, sent, clock = pack("nodes.comfy.progress"), [], [0.0]
    server, real = PromptServer.instance, module.time
    server.send_progress_text = lambda text, node_id: sent.append(text)
    module.time = types.SimpleNamespace(monotonic=lambda: clock[0])
    try:
        progress = module.Progress("7", label=label)
        for step in [*range(1, steps + 1), *[steps] * 10]:
            clock[0] += seconds / steps
            progress(step, steps, {"r2": 0.8123})
        long = "bird = 28% tiny + 25% constructionally + 17% finch + 13% raven + 12% impressionistic + 28% tiny + 25% constructions"
        module.send_text("7", f"{long}\nbird-tiny-construction-finch-856bc0f39f.safetensors")
    finally:
        module.time = real
        del server.send_progress_text
    return sent


def identity(pack, wired):
    """What tells the wired model from every other, and how long that took."""
    start = time.perf_counter()
    found = pack("nodes.comfy").graph_identity(wired["model"], wired["clip"], *([wired["vae"]] if "vae" in wired else []))
    return {"identity": found, "seconds": time.perf_counter() - start}


def node(pack, module, name):
    """A node of the pack, to be executed in a probe."""
    return type(name, (getattr(pack(f"nodes.{module}"), name),), {"hidden": types.SimpleNamespace(unique_id=None)})


def decomposed(pack, wired):
    """What Decompose Concept makes of the wires, with its defaults."""
    given = {"concept": "bird", "template": "a photo of a {}", "words": 3, "seed": 0, "size": 0}
    node(pack, "decompose", "DecomposeConcept").execute(wired["model"], wired.get("clip"), **given)


def verb(pack, wired, kind, path, given):
    """Save what ``decompose_concept`` or ``solve_edit`` finds for the wired model."""
    host = pack("nodes.comfy")
    if kind == "decompose":
        with host.graph_model(wired["model"], wired["clip"], wired.get("vae"), wired.get("scorer")) as model:
            found = pack("core.decompose").decompose_concept(model, **given)
    else:
        concepts = [pack("core.edit").Concept(text, attributes=tuple(map(tuple, shares))) for text, shares in given.pop("concepts")]
        with host.graph_reading(wired["model"], wired["clip"]) as model:
            found = pack("core.edit").solve_edit(model, concepts, **given)
    found.to("cpu").save(path, overwrite=True)


def executed(pack, wired, what):
    """Execute a node on the wires by name, at little cost, and return a hash of its result."""
    model, clip, vae = wired["model"], wired["clip"], wired["vae"]
    asked = {"concept": "bird", "template": "a photo of a {}", "words": 2, "seed": 5, "size": 64, "budget": "fast"}
    kind, _, method = what.partition(" ")
    if kind == "decompose":
        (found,), *_ = node(pack, "decompose", "DecomposeConcept").execute(model, clip, method=method, reuse=False, **asked).args
        return found.content_hash()
    if kind == "erase":
        given = {"concepts": "circle -> square", "keep": "ring", "strength": 1.0, "hard": False, "seed": 5}
        return node(pack, "edit", "EraseConcept").execute(model, clip, method=method, **given).args[1].content_hash()
    words = wired["decomposition"]
    if kind == "adjust":
        return node(pack, "decomposition", "AdjustWords").execute(words, clip, adjustments="+flame: 20%").args[0].content_hash()
    given = {"pictures": 1, "seed": 5, "steps": 2, "cfg": 3.0, "size": 64}
    pictures = node(pack, "decomposition", "WordPictures").execute(model, clip, vae, words, **given).args[1]
    return hashlib.sha256(pictures.numpy().tobytes()).hexdigest()


def random_state(pack, wired, what):
    """What a node makes of two global random states, and whether it leaves them as they are."""
    before, found = (random.getstate(), np.random.get_state(), torch.get_rng_state()), []  # noqa: NPY002

    def states():
        return repr((random.getstate(), np.random.get_state(), torch.get_rng_state().tolist()))  # noqa: NPY002

    try:
        for seed in (1, 2):
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            torch.manual_seed(seed)
            given = states()
            found.append([executed(pack, wired, what), states() == given])
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.set_rng_state(before[2])
    return found


def cancelled(pack, wired, what, at):
    """Interrupt a node in one of its model calls: how many it made after that, and what it left behind."""
    encoder, denoiser = pack("nodes.comfy.text").GraphTextEncoder, pack("nodes.comfy.denoiser").GraphDenoiser
    kind, name = (encoder, "encode") if what in ("text", "erase") else (denoiser, "denoise")
    real, calls = getattr(kind, name), 0

    def counted(self, *args):
        nonlocal calls
        calls += 1
        if calls == at:
            comfy.model_management.interrupt_current_processing()
        return real(self, *args)

    def files():
        keys = ("conceptkit_cache", "conceptkit_decompositions", "conceptkit_edits")
        folders = [Path(folder_paths.get_folder_paths(key)[0]) for key in keys]
        return {str(path) for folder in folders for path in folder.rglob("*") if path.is_file()}

    def graphs():
        gc.collect()
        return sum(type(held) is torch.Tensor and held.requires_grad for held in gc.get_objects())

    asked = {"concept": "bird", "template": "a picture of a {}", "words": 2, "seed": 6, "size": 64, "budget": "fast"}
    before, held = files(), graphs()
    setattr(kind, name, counted)
    try:
        if what == "erase":
            given = {"concepts": "circle", "keep": "", "method": "conceptkit", "strength": 1.0, "hard": False, "seed": 0}
            node(pack, "edit", "EraseConcept").execute(wired["model"], wired["clip"], **given)
        elif what == "conceptor":
            node(pack, "decompose", "DecomposeWithConceptor").execute(wired["model"], wired["clip"], select="r2", **asked)
        else:
            node(pack, "decompose", "DecomposeConcept").execute(wired["model"], wired["clip"], method=what, **asked)
    except comfy.model_management.InterruptProcessingException:
        pass
    else:
        raise AssertionError("not interrupted")
    finally:
        setattr(kind, name, real)
    wires = [wired["model"], wired["clip"].patcher, wired["vae"].patcher]
    loaded = [entry.model for entry in comfy.model_management.current_loaded_models if entry.model is not None]
    return {
        "later": calls - at,
        "foreign": sum(not any(model is wire for wire in wires) for model in loaded),
        "files": sorted(files() - before),
        "graphs": graphs() - held,
        "interrupting": comfy.model_management.processing_interrupted(),
    }


def other_clip(pack, wired):
    """Read a decomposition with another model's CLIP."""
    pack("nodes.words").conditioning(wired["decomposition"], narrow_clip(pack))
    raise AssertionError("accepted")


def picture(pack, wired, prompt, negative, seed, steps, guidance, sampler, path):
    """Sample through the pack's host; latents and picture go to a file, with how far a stock latent and conditioning on the wires are."""
    sampling = pack("core.sampling")
    with pack("nodes.comfy").graph_model(wired["model"], wired["clip"], wired["vae"]) as model, torch.no_grad():
        noise = sampling.initial_noise([seed], model.denoiser.latent_channels, 16, 16)
        sigmas = sampling.schedule(model.denoiser, steps)
        positive, empty = model.text.encode([prompt]), model.text.encode([negative])
        latents = sampling.sample(model, positive, empty, noise, sigmas, guidance=guidance, sampler=sampler)
        pictures = model.autoencoder.decode(latents)
        again = model.autoencoder.encode(pictures)
        save_file({"latents": latents, "pictures": pictures, "encoded": again, "context": positive.context, "sigmas": sigmas}, path)
        result = {"evals": model.meter.evals, "calls": model.meter.calls, "size": float(latents.abs().max())}
        result["velocity"] = model.predicts_velocity
        if "latent" in wired:
            result["latent"] = float((wired["latent"]["samples"] - latents).abs().max())
        if "conditioning" in wired:
            result["conditioning"] = float((wired["conditioning"][0][0] - positive.context).abs().max())
    return result


def score(pack, wired, texts, pictures, path):
    """What a scorer makes of texts and of the pictures in a file, and a gradient to the pictures, as a method would ask for it."""
    scorer = wired["scorer"]
    given = load_file(pictures)["pictures"]
    found = {"outside": scorer.embed_texts(texts), "read": pack("core.score").zero_shot(scorer, given, texts)}
    with pack("nodes.comfy").graph_model(wired["model"], wired["clip"], scorer=scorer) as model:
        moving = given.clone().requires_grad_()
        vectors, words = model.scorer.embed_pictures(moving), model.scorer.embed_texts(texts)
        (vectors @ words.T).square().sum().backward()
        found |= {"pictures": vectors.detach(), "texts": words, "gradient": moving.grad}
    save_file({name: tensor.clone() for name, tensor in found.items()}, path)
    protocol = pack("core.model").ImageScorer
    return {"scorer": isinstance(scorer, protocol), "scale": scorer.logit_scale}


@contextlib.contextmanager
def low_memory(on):
    """As on a GPU too small for the network: its weights stay behind, unpatched, and are fetched and patched at every call."""
    management = comfy.model_management
    load = management.load_models_gpu

    def little(models, **kwargs):
        load(models, **kwargs)
        for model in models:
            if not model.is_clip:
                model.partially_unload(model.offload_device, 1e12)

    if on:
        management.unload_all_models()
        management.load_models_gpu = little
    try:
        yield
    finally:
        management.load_models_gpu = load
        if on:
            management.unload_all_models()


def gradients(pack, wired, word, path, lowvram=False):
    """The gradient of a loss to a token embedding and to the conditioning; with ``lowvram``, on weights fetched at every call."""
    with low_memory(lowvram), pack("nodes.comfy").graph_model(wired["model"], wired["clip"]) as model:
        rows = model.text.tables["l"][model.text.tokenize(word)].repeat(2, 1, 1).requires_grad_()
        conditioning = model.text.encode([["a photo of a ", {"l": rows}]])
        conditioning.context.retain_grad()
        x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)) * 3
        model.denoise(x, torch.tensor([3.0, 0.7]), conditioning).square().mean().backward()
        with torch.no_grad():
            plain = model.text.encode([f"a photo of a {word}"]).context
            table = model.text.tables["l"]
        save_file({"rows": rows.grad, "context": conditioning.context.grad, "plain": plain, "table": table}, path)
        again = sum(map(overridden, wired["model"].model.diffusion_model.modules()))
        difference = float((plain - conditioning.context).abs().max().detach())
        return {"difference": difference, "ids": model.text.tokenize("A Photo of a café!"), "recomputed": again}


def through_pixels(pack, wired, given, path):
    """The gradient of a loss on pictures, and on the latents they are encoded to, to the latents they were decoded from."""
    with pack("nodes.comfy").graph_model(wired["model"], wired["clip"], wired["vae"]) as model:
        tensors = load_file(given)
        with torch.no_grad():
            stock = model.autoencoder.decode(tensors["latents"])
            stock_again = model.autoencoder.encode(stock)
        leaf = tensors["latents"].clone().requires_grad_()
        pictures = model.autoencoder.decode(leaf)
        pictures.retain_grad()
        again = model.autoencoder.encode(pictures)
        ((pictures * tensors["on pictures"]).sum() + (again * tensors["on latents"]).sum()).backward()
        # Through the network too, after whatever was loaded for the VAE.
        x = tensors["latents"].clone().requires_grad_()
        pictures_of_x0 = model.autoencoder.decode(model.denoise(x, 1.0, model.text.encode(["a circle"]).detach()))
        pictures_of_x0.square().mean().backward()
        found = {"latents": leaf.grad, "pictures": pictures.grad, "x": x.grad}
    save_file({name: tensor.detach().clone() for name, tensor in found.items()}, path)
    return {"decode": float((pictures - stock).abs().max()), "encode": float((again - stock_again).abs().max())}


def slope(pack, wired):
    """A loss of what the model predicts, and how it grows along one direction of the conditioning: by autograd and by a difference."""
    with pack("nodes.comfy").graph_model(wired["model"], wired["clip"]) as model:
        Conditioning = pack("core.model").Conditioning
        generator = torch.Generator().manual_seed(0)
        context = model.text.encode(["a photo of a bird"]).context.detach()
        x = torch.randn(1, 4, 16, 16, generator=generator) * 3
        along = torch.randn(context.shape, generator=generator) / context.numel() ** 0.5

        def loss(at):
            return model.denoise(x, 1.0, Conditioning(at)).double().square().sum()

        leaf = context.clone().requires_grad_()
        value = loss(leaf)
        value.backward()
        with torch.no_grad():
            step = 0.05 * context.norm()
            difference = (loss(context + step * along) - loss(context - step * along)) / (2 * step)
        return {"loss": float(value), "gradient": float((leaf.grad * along).sum()), "difference": float(difference)}


def overwritten(pack, wired):
    """Take a gradient through a replaced attention that overwrites what the gradient needs."""
    model = wired["model"].clone()

    def attention(q, k, v, extra_options):
        weights = (q @ k.transpose(-1, -2)).softmax(-1)
        found = weights @ v
        weights.zero_()
        return found

    for block in range(12):
        model.set_model_attn2_replace(attention, "input", block)
        model.set_model_attn2_replace(attention, "output", block)
    with pack("nodes.comfy").graph_model(model, wired["clip"]) as host:
        context = host.text.encode(["a bird"]).context.detach().requires_grad_()
        host.denoise(torch.ones(1, 4, 16, 16), 1.0, pack("core.model").Conditioning(context)).sum().backward()
    raise AssertionError("accepted")


def failure(pack, wired, kind):
    """Fail inside the block; the graph must survive it."""
    with pack("nodes.comfy").graph_model(wired["model"], wired["clip"], wired["vae"]) as model:
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
            model.denoise(x, 1.0, conditioning).sum().backward(retain_graph=True)
            time.sleep(0.01)


def narrow_clip(pack):
    """A CLIP like the demo's, of width 64."""
    target = pack("nodes.demo_model").ConceptKitShapes({"context_dim": 96}).clip_target()
    target.params["textmodel_json_config"] |= {"hidden_size": 64, "num_hidden_layers": 1}
    return comfy.sd.CLIP(target)


def refused_scorer(pack, wired, path):
    """Join a scorer with another model's CLIP."""
    pack("nodes.comfy").graph_scorer(path, narrow_clip(pack))
    raise AssertionError("accepted")


def refused(pack, wired, what):
    """Connect something unsupported."""
    model, clip = wired["model"], wired.get("clip")
    if what == "other clip":
        clip = narrow_clip(pack)
    if what == "architecture":
        model = types.SimpleNamespace(model=torch.nn.Linear(2, 2))
    if what == "refiner":
        model = model.clone()
        config = model.model.model_config
        model.model = types.SimpleNamespace(diffusion_model=model.model.diffusion_model, model_config=config, adm_channels=2560)
    with pack("nodes.comfy").graph_model(model, clip, wired.get("vae")):
        raise AssertionError("accepted")


def dynamic(pack, wired):
    """Where weights live in evictable memory the pack works on copies of its own, and leaves nothing of them loaded."""
    model, clip, vae = wired["model"].clone(), wired["clip"].clone(), copy.copy(wired["vae"])
    clip.patcher, vae.patcher = clip.patcher.clone(), vae.patcher.clone()
    for patcher in (model, clip.patcher, vae.patcher):
        patcher.is_dynamic = lambda: True

    def loaded():
        return {id(entry.model.model) for entry in comfy.model_management.current_loaded_models if entry.model is not None}

    before, theirs = loaded(), {id(model.model), id(clip.cond_stage_model), id(vae.first_stage_model)}
    with pack("nodes.comfy").graph_model(model, clip, vae) as seen:
        context = seen.text.encode(["a red circle"]).context.requires_grad_()
        denoised = seen.denoise(torch.zeros(1, 4, 16, 16), 1.0, pack("core.model").Conditioning(context))
        seen.autoencoder.decode(denoised).sum().backward()
        used = loaded() - before
    result = {"own": len(used) == 3 and not used & theirs, "gradient": float(context.grad.norm())}
    return result | {"left": len(loaded() & used)}


def large(pack, wired, cells):
    """One gradient step to a token embedding through a model of real size: seconds, and the process's peak memory in GiB (Linux)."""
    before = state_hash(wired)
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")
    start = time.perf_counter()
    with pack("nodes.comfy").graph_model(wired["model"], wired["clip"]) as model:
        loaded = time.perf_counter()
        slot = {name: table[320:321].clone().requires_grad_() for name, table in model.text.tables.items()}
        conditioning = model.text.encode([["a photo of a ", slot]])
        x = torch.randn(1, 4, cells, cells, generator=torch.Generator().manual_seed(0))
        model.denoise(x, 5.0, conditioning).square().mean().backward()
        stepped = time.perf_counter()
        norms = {name: float(rows.grad.norm()) for name, rows in slot.items()}
        family, dtype = model.family, str(next(wired["model"].model.diffusion_model.parameters()).dtype)
    with open("/proc/self/status") as status:
        peak = next(int(line.split()[1]) / 2**20 for line in status if line.startswith("VmHWM"))
    result = {"family": family, "dtype": dtype, "load": loaded - start, "step": stepped - loaded, "peak": peak, "norms": norms}
    return result | {"unchanged": state_hash(wired) == before}


def state_hash(wired):
    """Like ``weights``, of a sample of the tensors: those of a real size take long to read."""
    digest = hashlib.sha256()
    for module in (wired["model"].model, wired["clip"].cond_stage_model):
        for name, tensor in sorted(module.state_dict().items())[::7]:
            digest.update(name.encode() + tensor.detach().clone().contiguous().flatten()[:4096].view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def make_checkpoint(pack, wired, kind, path):
    """A file of random fp16 weights with the sizes of SD 1.5 or SDXL, in their single-file layout, without an autoencoder."""
    import comfy.model_detection
    import comfy.ops
    import comfy.supported_models
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    config = {"in_channels": 4, "out_channels": 4, "model_channels": 320, "use_spatial_transformer": True, "legacy": False}
    if kind == "SD15":
        config |= {"num_res_blocks": [2] * 4, "channel_mult": [1, 2, 4, 4], "transformer_depth": [1] * 6 + [0, 0], "num_heads": 8}
        config |= {"transformer_depth_output": [1] * 9 + [0] * 3, "transformer_depth_middle": 1, "context_dim": 768}
        config |= {"adm_in_channels": None, "use_linear_in_transformer": False, "use_temporal_attention": False}
    else:
        config |= {"num_res_blocks": [2] * 3, "channel_mult": [1, 2, 4], "transformer_depth": [0, 0, 2, 2, 10, 10], "context_dim": 2048}
        config |= {"transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "transformer_depth_middle": 10, "num_head_channels": 64}
        config |= {"adm_in_channels": 2816, "num_classes": "sequential", "use_linear_in_transformer": True, "use_temporal_attention": False}
    model_config = getattr(comfy.supported_models, kind)(config)
    unet = UNetModel(image_size=32, **config, dtype=torch.float16, device="meta", operations=comfy.ops.disable_weight_init)
    clip = model_config.clip_target({}).clip(device="meta", dtype=torch.float16)
    sd = {"model.diffusion_model." + name: tensor for name, tensor in unet.state_dict().items()}
    text = {name: tensor for name, tensor in clip.state_dict().items() if "logit_scale" not in name}
    write_random(sd | model_config.process_clip_state_dict_for_saving(text), path)
    return {"unet": sum(p.numel() for p in unet.parameters())}


def write_random(sd, path):
    """A safetensors file of random fp16 tensors with the names and shapes of ``sd``, one tensor in memory at a time."""
    header, end = {}, 0
    for name, tensor in sd.items():
        header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [end, end := end + 2 * tensor.numel()]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator().manual_seed(0)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in sd.items():
            if tensor.ndim < 2:
                value = torch.full(tensor.shape, float(name.endswith("weight")))
            else:
                scale = 0.02 if "embedding" in name else max(tensor.shape[1:].numel(), 1) ** -0.5
                value = torch.randn(tensor.shape, generator=generator) * scale
            file.write(value.half().numpy().tobytes())


def edited(pack, wired, file, lora):
    """How far the weights of edited models are from W T as worked out here, relative to W, in the compositions that must be exact."""
    import comfy.utils

    host, edit = pack("nodes.comfy"), pack("core.edit").ContextEdit.load(folder_paths.get_full_path("conceptkit_edits", file))
    model = wired["model"]
    original = {key: weight.clone() for key, weight in model.model.state_dict().items() if "attn2.to_k" in key or "attn2.to_v" in key}
    transform = torch.eye(edit.width) + edit.context.u @ edit.context.v.T
    sd = comfy.utils.load_torch_file(folder_paths.get_full_path("loras", lora))
    up, down = (sd[next(key for key in sd if part in key)] for part in ("lora_up", "lora_down"))
    touched = host.GraphCrossAttention(model).keys["down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"]
    with_lora = comfy.sd.load_lora_for_models(model, None, sd, 1.0, 0.0)[0]
    delta = {key: up @ down if key == touched else torch.zeros(()) for key in original}

    def far(patcher, wanted):
        """The largest relative distance of what is really loaded from what is wanted."""
        comfy.model_management.load_models_gpu([patcher])
        live = patcher.model.state_dict()
        return max(float((live[key] - wanted(key)).norm() / original[key].norm()) for key in original)

    found = {"layers": len(original), "moved": far(model, lambda key: original[key] @ transform)}
    patched = host.patch_model(model, edit)
    found["patched"] = far(patched, lambda key: original[key] @ transform)
    found["lora then edit"] = far(host.patch_model(with_lora, edit), lambda key: (original[key] + delta[key]) @ transform)
    after = comfy.sd.load_lora_for_models(patched, None, sd, 1.0, 0.0)[0]
    found["edit then lora"] = far(after, lambda key: original[key] @ transform + delta[key])
    found["twice"] = far(host.patch_model(patched, edit), lambda key: original[key] @ transform @ transform)
    half = (torch.eye(edit.width) + transform) / 2
    found["half"] = far(host.patch_model(model, edit.scale(0.5)), lambda key: original[key] @ half)
    # Another clone is loaded, so the live weights are not the base's.
    comfy.model_management.load_models_gpu([with_lora])
    found["beside another clone"] = far(host.patch_model(model, edit), lambda key: original[key] @ transform)
    doubled = model.clone()
    doubled.add_weight_wrapper(touched, lambda weight: weight * 2)
    seen = dict(host.GraphCrossAttention(doubled).key_values())
    paths = {key: path for path, key in host.GraphCrossAttention(model).keys.items()}
    found["wrapped"] = float((seen[paths[touched]] - 2 * original[touched]).abs().max())
    comfy.model_management.load_models_gpu([with_lora])
    with_lora.partially_unload(with_lora.offload_device, 1e12)
    lazily = dict(host.GraphCrossAttention(with_lora).key_values())
    found["lowvram"] = max(float((lazily[paths[key]] - original[key] - delta[key]).abs().max()) for key in original)
    return found


def interrupted_edit(pack, wired):
    """Interrupt while an edit is solved."""
    from server import PromptServer

    progress = pack("nodes.comfy").Progress(None)

    def on_step(step, total, metrics):
        comfy.model_management.interrupt_current_processing()
        progress(step, total, metrics)

    assert PromptServer.instance is not None
    with pack("nodes.comfy").graph_reading(wired["model"], wired["clip"]) as host:
        pack("core.edit").solve_edit(host, ["circle -> square"], on_step=on_step)
    raise AssertionError("not interrupted")


def named(pack, wired, names, folder):
    """What a save node makes of names in ``folder``: the path it wrote and whether that is listed, or the sentence it refuses them with."""
    files = pack("nodes.files")
    folder_paths.add_model_folder_path("conceptkit_probe", folder)
    folder_paths.folder_names_and_paths["conceptkit_probe"][1].add(".safetensors")
    found = []
    for name in names:
        said = files.check_name("conceptkit_probe", name)
        if said is True:
            path = files.target("conceptkit_probe", name, "subject", "0123456789abcdef")
            pack("core.artifact").write_bytes(path, b"", overwrite=True)
            found.append([str(path), files.listed("conceptkit_probe", path)])
        else:
            found.append(said)
    listed = set(files.names("conceptkit_probe"))
    return [said if isinstance(said, str) else [said[0], said[1] in listed] for said in found]
