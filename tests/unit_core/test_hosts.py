"""The diffusers host against independent computations on tiny random pipelines of each family."""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from conceptkit.core.demo.architecture import AUTOENCODER, TEXT, UNET, build_autoencoder, build_scorer, build_text_encoder, build_unet
from conceptkit.core.hosts.checkpoint import from_single_file, to_single_file
from conceptkit.core.hosts.diffusers import DiffusersDenoiser, DiffusersText, load_model
from conceptkit.core.model import Autoencoder, Denoiser, ImageScorer, Model, TextEncoder, UnsupportedModel
from conceptkit.core.sampling import sample
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

FAMILIES = ("sd1", "sd2", "sdxl")
WORDS = ("cat", "dog", "photo", "of")


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's byte alphabet and four whole words; token 0 is "!" as in the real vocabulary."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = characters + [c + "</w>" for c in characters]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces[:2] = [pieces[0] + pieces[1]]
            tokens.append(pieces[0])
    tokens = list(dict.fromkeys([*tokens, "<|startoftext|>", "<|endoftext|>"]))
    return {token: i for i, token in enumerate(tokens)}, list(dict.fromkeys(merges))


def tokenizer(pad: str = "<|endoftext|>") -> CLIPTokenizer:
    vocab, merges = vocabulary()
    return CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad, model_max_length=77)


def text_config(width: int, act: str, layers: int = 3) -> CLIPTextConfig:
    vocab, _ = vocabulary()
    return CLIPTextConfig(
        vocab_size=len(vocab),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        hidden_act=act,
        projection_dim=width,
        bos_token_id=vocab["<|startoftext|>"],
        eos_token_id=vocab["<|endoftext|>"],
        pad_token_id=0,
    )


def build_pipeline(family: str) -> diffusers.DiffusionPipeline:
    """A random pipeline; weights are scaled up so that the text matters to the picture."""
    vae = diffusers.AutoencoderKL(
        block_out_channels=(16, 16, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=8,
        latent_channels=4,
        scaling_factor={"sdxl": 0.13025}.get(family, 0.18215),
    )
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim={"sdxl": 56}.get(family, 32),
        attention_head_dim=4,
        use_linear_projection=family != "sd1",
        **(
            {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 72}
            if family == "sdxl"
            else {}
        ),
    )
    with torch.no_grad():
        for name, weight in unet.named_parameters():
            if "attn2" in name:
                weight.mul_(4)
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        prediction_type="v_prediction" if family == "sd2" else "epsilon",
    )
    if family == "sdxl":
        return diffusers.StableDiffusionXLPipeline(
            vae,
            CLIPTextModel(text_config(32, "quick_gelu")),
            CLIPTextModelWithProjection(text_config(24, "gelu")),
            tokenizer(),
            tokenizer("!"),
            unet,
            scheduler,
            add_watermarker=False,
        )
    text = CLIPTextModel(text_config(32, "gelu" if family == "sd2" else "quick_gelu"))
    return diffusers.StableDiffusionPipeline(
        vae, text, tokenizer("!" if family == "sd2" else "<|endoftext|>"), unet, scheduler, None, None, requires_safety_checker=False
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pipelines")
    with torch.random.fork_rng(devices=[]):
        for seed, family in enumerate(FAMILIES):
            torch.manual_seed(seed)
            build_pipeline(family).save_pretrained(root / family)
    return {family: root / family for family in FAMILIES}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def models(folders: dict[str, Path]) -> dict[str, Model]:
    """One model a family for every test that only asks it."""
    return {family: load_model(folders[family]) for family in FAMILIES}


@pytest.fixture
def model(models: dict[str, Model], family: str) -> Model:
    return models[family]


@pytest.fixture(scope="module")
def pipes(folders: dict[str, Path]) -> dict[str, diffusers.DiffusionPipeline]:
    """The library's own pipelines. No test may change them."""
    loaded = {family: diffusers.DiffusionPipeline.from_pretrained(folders[family], local_files_only=True) for family in FAMILIES}
    for pipe in loaded.values():
        pipe.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture
def pipe(pipes: dict[str, diffusers.DiffusionPipeline], family: str) -> diffusers.DiffusionPipeline:
    return pipes[family]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights(model: Model) -> dict[str, torch.Tensor]:
    assert isinstance(model.denoiser, DiffusersDenoiser) and isinstance(model.text, DiffusersText)
    modules = [model.denoiser._unet, model.autoencoder._vae, *(encoder.module for encoder in model.text._encoders)]
    return {f"{i}.{key}": value for i, module in enumerate(modules) for key, value in module.state_dict().items()}


def test_is_what_methods_expect(model: Model, family: str) -> None:
    assert model.family == family
    assert isinstance(model.text, TextEncoder) and isinstance(model.denoiser, Denoiser) and isinstance(model.autoencoder, Autoencoder)
    assert set(model.text.tables) == {"sd1": {"l"}, "sd2": {"h"}, "sdxl": {"l", "g"}}[family]
    assert model.predicts_velocity is (family == "sd2")
    assert model.denoiser.downscale == 8 and model.denoiser.latent_channels == 4
    assert model.denoiser.side == 8 * model.denoiser._unet.config.sample_size
    sigmas = model.denoiser.training_sigmas
    assert sigmas.shape == (1000,) and sigmas.dtype == torch.float32 and bool((sigmas.diff() > 0).all())
    assert not any(value.requires_grad for value in weights(model).values())


def test_text_equals_the_pipelines(model: Model, pipe: diffusers.DiffusionPipeline, family: str) -> None:
    prompts = ["a photo of a cat", "", "DOG?  xyz"]
    ours = model.text.encode(prompts)
    if family == "sdxl":
        context, _, pooled, _ = pipe.encode_prompt(prompts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
        torch.testing.assert_close(ours.pooled, pooled, atol=1e-5, rtol=1e-5)
    else:
        context, _ = pipe.encode_prompt(prompts, "cpu", 1, False)
        assert ours.pooled is None
    torch.testing.assert_close(ours.context, context, atol=1e-5, rtol=1e-5)


def test_picture_equals_the_pipelines(model: Model, pipe: diffusers.DiffusionPipeline) -> None:
    """Four steps whose noise levels are training levels: the same latents and the same picture."""
    start = noise(1, 4, 8, 8)
    pipe.scheduler.set_timesteps(4)
    sigmas = pipe.scheduler.sigmas.clone()
    first = float(sigmas[0])
    theirs = pipe(
        "a photo of a cat",
        negative_prompt="",
        height=64,
        width=64,
        num_inference_steps=4,
        guidance_scale=3.0,
        latents=start * (1 + first**2) ** 0.5 / first,
        output_type="latent",
    ).images
    ours = sample(model, model.text.encode(["a photo of a cat"]), model.text.encode([""]), start, sigmas, guidance=3.0, sampler="euler")
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)
    picture = (pipe.vae.decode(theirs / pipe.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(model.autoencoder.decode(ours), picture.detach(), atol=1e-3, rtol=0)


def test_encoding_pictures(model: Model, pipe: diffusers.DiffusionPipeline) -> None:
    pictures = noise(2, 3, 64, 64).sigmoid()
    expected = pipe.vae.encode(pictures * 2 - 1).latent_dist.mode() * pipe.vae.config.scaling_factor
    torch.testing.assert_close(model.autoencoder.encode(pictures), expected.detach())
    with pytest.raises(ValueError, match="multiples of 8"):
        model.autoencoder.encode(pictures[..., :-1])


def test_slots_stand_for_words(model: Model) -> None:
    """A slot holding a word's own embedding encodes as the word; a batch of slots as a batch of prompts."""
    assert model.text.tokenize("cat!") == [model.text.vocabulary[token] for token in ("cat</w>", "!</w>")]
    ids = model.text.tokenize("cat")
    assert ids == [model.text.vocabulary["cat</w>"]]
    cat, dog = (
        {name: table[[model.text.vocabulary[word]]] for name, table in model.text.tables.items()} for word in ("cat</w>", "dog</w>")
    )
    words = model.text.encode(["a photo of a cat", "a photo of a dog!"])
    for part in ("context", "pooled"):
        if (expected := getattr(words, part)) is not None:
            torch.testing.assert_close(getattr(model.text.encode([["a photo of a", cat], ["a photo of a", dog, "!"]]), part), expected)
    both = {name: torch.stack([cat[name], dog[name]]) for name in cat}
    batched = model.text.encode([["a photo of a", both, "!"], "cat"])
    assert len(batched) == 3
    torch.testing.assert_close(batched.context[1], words.context[1])


def test_without_gradients_a_text_is_encoded_the_same_bit_for_bit(model: Model) -> None:
    slot = {name: table[:2].clone().requires_grad_() for name, table in model.text.tables.items()}
    prompts = ["a photo of a cat", "", ["a ", slot, " dog"]]
    with torch.enable_grad():
        expected = model.text.encode(prompts)
    with torch.no_grad():
        found = model.text.encode(prompts)
    assert expected.context.requires_grad and torch.equal(found.context, expected.context)
    assert found.pooled is None or torch.equal(found.pooled, expected.pooled)


def test_gradients_of_the_text(model: Model, pipe: diffusers.DiffusionPipeline, family: str) -> None:
    """To a slot: what autograd of transformers' own forward gives for the row of the embedding table."""
    direction = noise(1, 77, sum(table.shape[1] for table in model.text.tables.values()))
    slot = {name: table[[model.text.vocabulary["cat</w>"]]].clone().requires_grad_() for name, table in model.text.tables.items()}
    (model.text.encode([["a photo of a", slot]]).context * direction).sum().backward()
    encoders = [pipe.text_encoder, pipe.text_encoder_2] if family == "sdxl" else [pipe.text_encoder]
    tables = [encoder.get_input_embeddings().weight for encoder in encoders]
    context = pipe.encode_prompt("a photo of a cat", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)[0]
    expected = torch.autograd.grad((context * direction).sum(), tables)
    for rows, grad in zip(slot.values(), expected, strict=True):
        torch.testing.assert_close(rows.grad[0], grad[model.text.vocabulary["cat</w>"]], atol=1e-4, rtol=1e-3)


def test_gradients_of_the_autoencoder_are_finite_differences() -> None:
    """On the trained demo model, at an image inside [0, 1], where decoding clamps nothing."""
    autoencoder = load_model("demo").autoencoder
    assert autoencoder is not None
    image = torch.nn.functional.interpolate(0.5 + 0.1 * noise(1, 3, 4, 4), size=64, mode="bilinear")
    latents = autoencoder.encode(image)
    for function, point in ((autoencoder.decode, latents), (autoencoder.encode, image)):
        variable = point.detach().requires_grad_()
        value = function(variable)
        weights, towards = noise(*value.shape, seed=1), noise(*point.shape, seed=2)
        (gradient,) = torch.autograd.grad((value * weights).sum(), variable)
        # Small steps, since the network is piecewise linear, and so float32 leaves two digits.
        ahead, behind = ((function(point + sign * 1e-4 * towards) * weights).double().sum() for sign in (1, -1))
        torch.testing.assert_close((gradient * towards).double().sum(), (ahead - behind) / 2e-4, rtol=2e-2, atol=0)
        assert function(point).grad_fn is None  # and nothing is kept for a gradient where none is asked for


def test_gradients_of_the_denoiser(model: Model) -> None:
    """Along random directions of latent and conditioning, autograd equals central differences."""
    x, sigma = noise(1, 4, 8, 8) * 3, torch.tensor([2.0])
    conditioning = model.text.encode(["a photo of a cat"])
    loss = noise(1, 4, 8, 8, seed=1)
    dx, dc = noise(*x.shape, seed=2), noise(*conditioning.context.shape, seed=3)

    def value(step: float) -> float:
        moved = conditioning.map(lambda t: t + step * dc if t.shape == dc.shape else t)
        return float((model.denoise(x + step * dx, sigma, moved).double() * loss).sum())

    x.requires_grad_()
    context = conditioning.context.clone().requires_grad_()
    before = model.meter.evals
    (model.denoise(x, sigma, conditioning.map(lambda t: context if t.shape == context.shape else t)) * loss).sum().backward()
    assert model.meter.evals == before + 3
    slope = float((x.grad * dx).sum() + (context.grad * dc).sum())
    x = x.detach()
    with torch.no_grad():
        assert slope == pytest.approx((value(5e-3) - value(-5e-3)) / 1e-2, rel=1e-2, abs=1e-2)


def test_laws(folders: dict[str, Path], models: dict[str, Model], family: str) -> None:
    """Same input, same bits; weights untouched by forward, backward and failure; no global random state read or written."""
    state = torch.get_rng_state()
    model = load_model(folders[family])
    kept = {key: value.clone() for key, value in weights(model).items()}
    x, sigma = noise(2, 4, 8, 8), torch.tensor([1.0, 7.0])
    conditioning = model.text.encode(["a cat", "a dog"])
    first = model.denoise(x, sigma, conditioning)
    assert torch.equal(first, model.denoise(x, sigma, model.text.encode(["a cat", "a dog"])))
    assert torch.equal(first, models[family].denoise(x, sigma, conditioning))
    assert (model.meter.evals, model.meter.calls) == (4, 2)
    model.denoise(x.requires_grad_(), sigma, conditioning).sum().backward()
    with pytest.raises(ValueError, match="own text encoder"):
        model.denoise(x, sigma, conditioning.map(lambda t: t[..., :-1]))
    assert all(torch.equal(value, kept[key]) for key, value in weights(model).items())
    assert all(value.grad is None for value in weights(model).values())
    assert torch.equal(torch.get_rng_state(), state)


def test_half_precision_keeps_float32_edges(folders: dict[str, Path], models: dict[str, Model], family: str) -> None:
    model, full = load_model(folders[family], dtype=torch.bfloat16), models[family]
    conditioning = model.text.encode(["a cat"])
    assert torch.equal(conditioning.context, full.text.encode(["a cat"]).context)
    x = noise(1, 4, 8, 8)
    half = model.denoise(x, 1.0, conditioning)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full.denoise(x, 1.0, conditioning), atol=0.1, rtol=0.1)


def test_sdxl_size_defaults_to_the_latents(models: dict[str, Model]) -> None:
    model = models["sdxl"]
    conditioning, x = model.text.encode(["a cat"]), noise(1, 4, 8, 16)
    plain = model.denoise(x, 1.0, conditioning)
    assert torch.equal(plain, model.denoise(x, 1.0, replace(conditioning, size=(64, 128, 0, 0, 64, 128))))
    assert not torch.equal(plain, model.denoise(x, 1.0, replace(conditioning, size=(64, 128, 8, 0, 64, 128))))
    with pytest.raises(ValueError, match="pooled"):
        model.denoise(x, 1.0, replace(conditioning, pooled=None))


def test_sd2_stops_before_the_last_of_24_layers(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["sd2"], tmp_path / "whole")
    text = CLIPTextModel(text_config(32, "gelu", layers=24))
    text.save_pretrained(folder / "text_encoder")
    ids = tokenizer("!")("a cat", padding="max_length", return_tensors="pt").input_ids
    expected = text.eval().final_layer_norm(text(ids, output_hidden_states=True).hidden_states[-2])
    torch.testing.assert_close(load_model(folder).text.encode(["a cat"]).context, expected.detach(), atol=1e-5, rtol=1e-5)


def test_reads_variants_and_shards(folders: dict[str, Path], models: dict[str, Model], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["sd1"], tmp_path / "pipeline")
    (folder / UNET_FILE).rename(folder / "unet/diffusion_pytorch_model.fp16.safetensors")
    text = CLIPTextModel.from_pretrained(folder / "text_encoder", local_files_only=True)
    (folder / "text_encoder/model.safetensors").unlink()
    text.save_pretrained(folder / "text_encoder", max_shard_size="20KB")
    assert len(list((folder / "text_encoder").glob("*.safetensors"))) > 1
    whole, parts = weights(models["sd1"]), weights(load_model(folder))
    assert all(torch.equal(value, parts[key]) for key, value in whole.items())


def test_zero_terminal_snr(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["sd2"], tmp_path / "zsnr")
    edit(folder / "scheduler" / "scheduler_config.json", rescale_betas_zero_snr=True)
    sigmas = load_model(folder).denoiser.training_sigmas
    kept = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=True
    ).alphas_cumprod
    torch.testing.assert_close(sigmas[:-1], ((1 - kept) / kept).sqrt()[:-1], rtol=1e-3, atol=1e-5)
    assert 4000 < float(sigmas[-1]) < 5000


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def drop_weight(path: Path) -> None:
    tensors = load_file(path)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, path, metadata={"format": "pt"})


UNET_FILE = "unet/diffusion_pytorch_model.safetensors"
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no pipeline": (lambda f: (f / "model_index.json").unlink(), "model_index.json: choose the folder"),
    "damaged index": (lambda f: (f / "model_index.json").write_text("{"), "damaged"),
    "list for an index": (lambda f: (f / "model_index.json").write_text("[]"), "damaged"),
    "flux": (lambda f: edit(f / "model_index.json", unet=[None, None], _class_name="FluxPipeline"), "FluxPipeline.*1.x, 2.x and SDXL"),
    "inpainting": (lambda f: edit(f / "unet/config.json", in_channels=9), "inpainting"),
    "instruct": (lambda f: edit(f / "unet/config.json", in_channels=8), "8 input channels"),
    "refiner": (lambda f: edit(f / "model_index.json", text_encoder=[None, None], text_encoder_2=["transformers", "X"]), "refiner"),
    "unclip": (lambda f: edit(f / "unet/config.json", class_embed_type="projection"), "unCLIP"),
    "flow matching": (lambda f: edit(f / "scheduler/scheduler_config.json", prediction_type="flow_prediction"), "flow_prediction"),
    "odd schedule": (lambda f: edit(f / "scheduler/scheduler_config.json", beta_schedule="squaredcos_cap_v2"), "squaredcos"),
    "bad betas": (lambda f: edit(f / "scheduler/scheduler_config.json", beta_end=7.0), "damaged noise schedule"),
    "truncated": (lambda f: truncate(f / UNET_FILE), "truncated"),
    "hostile header": (lambda f: (f / UNET_FILE).write_bytes(struct.pack("<Q", 1 << 62) + b"{}"), "truncated"),
    "pickle only": (lambda f: (f / UNET_FILE).rename(f / "unet/diffusion_pytorch_model.bin"), "pickle"),
    "missing weight": (lambda f: drop_weight(f / UNET_FILE), "lacks weights"),
    "missing text weight": (lambda f: drop_weight(f / "text_encoder/model.safetensors"), "lacks weights"),
    "other sizes": (lambda f: edit(f / "unet/config.json", block_out_channels=[64, 64]), "unet"),
    "nonsense in a config": (lambda f: edit(f / "text_encoder/config.json", hidden_size="wide"), "text_encoder"),
    "another kind of autoencoder": (lambda f: edit(f / "model_index.json", vae=["diffusers", "VQModel"]), "VQModel"),
    "no vocabulary": (lambda f: shutil.rmtree(f / "tokenizer"), "tokenizer.json"),
    "damaged vocabulary": (lambda f: edit(f / "tokenizer/tokenizer.json", model={"vocab": [1], "merges": []}), "tokenizer"),
    "larger vocabulary": (
        lambda f: edit(f / "tokenizer/tokenizer.json", model={"vocab": {str(i): i for i in range(9000)}, "merges": []}),
        "does not know",
    ),
}


@pytest.mark.parametrize("how", BROKEN)
def test_refuses(how: str, folders: dict[str, Path], tmp_path: Path) -> None:
    breaking, message = BROKEN[how]
    folder = shutil.copytree(folders["sd1"], tmp_path / "pipeline")
    breaking(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def test_refuses_parts_that_do_not_fit(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["sd1"], tmp_path / "pipeline")
    CLIPTextModel(text_config(24, "quick_gelu")).save_pretrained(folder / "text_encoder")
    with pytest.raises(ValueError, match="24 wide and its UNet reads 32"):
        load_model(folder)
    folder = shutil.copytree(folders["sdxl"], tmp_path / "xl")
    edit(folder / "model_index.json", text_encoder_2=[None, None])
    with pytest.raises(ValueError, match="no second text encoder"):
        load_model(folder)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_model(tmp_path / "nowhere")


def test_refuses_prompts_that_do_not_fit(models: dict[str, Model]) -> None:
    text = models["sdxl"].text
    assert len(text.tokenize("cat " * 75)) == 75
    with pytest.raises(ValueError, match=r"76 tokens .* at most 75"):
        text.tokenize("cat " * 76)
    with pytest.raises(ValueError, match="76 tokens"):
        text.encode(["cat", "cat " * 76])
    rows = {"l": torch.zeros(2, 32), "g": torch.zeros(2, 24)}
    with pytest.raises(ValueError, match="76 tokens"):
        text.encode([["cat " * 74, rows]])
    with pytest.raises(ValueError, match="needs 'g'"):
        text.encode([["a", {"l": rows["l"]}]])
    with pytest.raises(ValueError, match=r"\(n, 24\)"):
        text.encode([["a", {"l": rows["l"], "g": rows["l"]}]])
    with pytest.raises(ValueError, match="batch sizes"):
        text.encode(
            [
                [
                    "a",
                    {name: row.expand(2, *row.shape) for name, row in rows.items()},
                    {name: row.expand(3, *row.shape) for name, row in rows.items()},
                ]
            ]
        )
    with pytest.raises(ValueError, match="batch sizes"):
        text.encode([["a", {"l": rows["l"], "g": rows["g"].expand(2, 2, 24)}]])
    with pytest.raises(ValueError, match="non-empty"):
        text.encode([])


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained checkpoint in the demo's layout, stored in half precision."""
    path = tmp_path_factory.mktemp("single") / "tiny.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = [network.state_dict() for network in (build_unet(), build_text_encoder(), build_autoencoder(), build_scorer())]
    tensors = {key: value.half().contiguous() for key, value in to_single_file(*parts).items()}
    save_file(tensors, path, metadata={"conceptkit": json.dumps(header())})
    return path


def header() -> dict[str, object]:
    return {"format": "conceptkit-demo", "version": 1, "unet": UNET, "text": TEXT, "autoencoder": AUTOENCODER, "scorer": {"width": 96}}


@pytest.mark.parametrize(
    "change",
    [
        {"scheduler": {"num_train_timesteps": 10**15, "beta_schedule": "scaled_linear"}},
        {"scheduler": {"num_train_timesteps": 1000, "beta_start": None}},
        {"scheduler": {"num_train_timesteps": [1000]}},
        {"scheduler": {"num_train_timesteps": 3, "trained_betas": "many"}},
        {"scheduler": [1000]},
        {"words": 5},
        {"words": [1, None]},
        {"unet": {**UNET, "attention_head_dim": 0}},
    ],
    ids=str,
)
def test_a_single_file_with_a_hostile_header_is_refused(single: Path, tmp_path: Path, change: dict[str, object]) -> None:
    path = tmp_path / "model.safetensors"
    save_file(load_file(single), path, metadata={"conceptkit": json.dumps(header() | change)})
    with pytest.raises(ValueError, match=r"fetch|export") as caught:
        load_model(path)
    assert "\n" not in str(caught.value)


def test_single_file(single: Path) -> None:
    """The demo's layout: every part works, and equals the networks it was made from."""
    state = torch.get_rng_state()
    model = load_model(single)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.name == "tiny" and model.family == "sd1" and isinstance(model.scorer, ImageScorer)
    tensors = load_file(single)
    unet = build_unet()
    unet_sd, _, vae_sd, _ = from_single_file(tensors)
    unet.load_state_dict(unet_sd)
    conditioning = model.text.encode(["a bird"])
    x, sigma = noise(1, 4, 16, 16), float(model.denoiser.training_sigmas[500])
    predicted = unet(x / (1 + sigma**2) ** 0.5, 500, conditioning.context).sample
    torch.testing.assert_close(model.denoise(x, sigma, conditioning), (x - sigma * predicted).detach(), atol=1e-4, rtol=1e-4)
    pictures = noise(1, 3, 64, 64).sigmoid()
    latents = model.autoencoder.encode(pictures)
    assert latents.shape == (1, 4, 8, 8)
    vae = build_autoencoder()
    vae.load_state_dict(vae_sd)
    expected = (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(model.autoencoder.decode(latents), expected.detach())
    for vectors in (model.scorer.embed_pictures(pictures), model.scorer.embed_texts(["a bird", "a red circle"])):
        torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(len(vectors)))
    assert model.scorer.logit_scale == pytest.approx(math.exp(2.5), rel=1e-3)


def restated(single: Path, path: Path, header: dict[str, object]) -> Path:
    """The same tensors under another header."""
    stored = single.read_bytes()
    end = 8 + struct.unpack("<Q", stored[:8])[0]
    index = json.loads(stored[8:end]) | {"__metadata__": {"conceptkit": json.dumps(header)}}
    text = json.dumps(index).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + stored[end:])
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "diffusers folder"),
        ({"version": 2}, "diffusers folder"),
        ({"unet": UNET | {"block_out_channels": [1 << 40, 1 << 40]}}, "do not fit"),
        ({"unet": UNET | {"layers_per_block": 2}}, "do not fit"),
        ({"text": TEXT | {"hidden_size": "wide"}}, "do not fit"),
        ({"unet": []}, "do not fit"),
        ({"autoencoder": {"surprise": 1}}, "do not fit"),
        ({"scorer": {"width": 1 << 40}}, "do not fit"),
        ({"scorer": []}, "do not fit"),
    ],
)
def test_single_file_with_a_wrong_header(single: Path, tmp_path: Path, changes: dict[str, object], message: str) -> None:
    path = restated(single, tmp_path / "odd.safetensors", header() | changes)
    with pytest.raises(ValueError, match=message) as caught:
        load_model(path)
    assert "\n" not in str(caught.value)
    assert (message == "diffusers folder") == isinstance(caught.value, UnsupportedModel)
