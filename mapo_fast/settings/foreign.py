"""Keys of other trainers (kohya's sd-scripts, diffusers, OneTrainer, SimpleTuner) and what they are here.

A message translates the name and never the value: numbers of another method say nothing about this one.
"""

from __future__ import annotations

from typing import NamedTuple

RATES = (
    "theirs are not preference rates, so copy none: see docs/training.md; the presets have 1e-5 for a LoRA "
    "and 1e-6 for a full fine-tune"
)
_PAIRS = "counts pairs: 1 pair is 2 images"
_EPOCHS = "an epoch is training pairs / (train.pairs_per_batch × train.accumulation) of them"


class Foreign(NamedTuple):
    """A key of another trainer."""

    name: str
    ours: str
    """The setting, `section.key`, that is meant; empty where there is none."""
    note: str = ""
    """Note for the message: how the setting differs, or what happens without one."""

    @property
    def hint(self) -> str:
        """The hint in the message on an unknown key."""
        if not self.ours:
            return self.note
        return f"did you mean {self.ours}?" + (f" {self.note}" if self.note else "")


def foreign(key: str) -> Foreign | None:
    """The entry of a key, in any spelling: `--learning-rate`, `learning_rate`."""
    return _BY_NAME.get(key.strip().lstrip("-").replace("-", "_").lower())


_ALIKE = {
    "model.path": "pretrained_model_name_or_path base_model_name model_name_or_path pretrained_model "
    "checkpoint ckpt",
    "model.vae": "pretrained_vae_model_name_or_path vae_model_name vae_path",
    "model.unet": "pretrained_unet_name_or_path",
    "adapter.start": "network_weights lora_weights init_lora",
    "data.max_tokens": "max_token_length tokenizer_max_length",
    "data.flip": "flip_aug random_flip",
    "data.bucket_step": "bucket_reso_steps aspect_bucket_alignment",
    "data.default_caption": "instance_prompt class_tokens",
    "adapter.rank": "network_dim lora_rank lora_r dim",
    "adapter.alpha": "network_alpha lora_alpha",
    "adapter.targets": "lora_target_modules target_modules",
    "optim.schedule": "lr_scheduler lr_scheduler_type learning_rate_scheduler",
    "optim.weight_decay": "adam_weight_decay",
    "optim.eps": "adam_epsilon",
    "optim.max_grad_norm": "gradient_clipping clip_grad_norm",
    "train.accumulation": "gradient_accumulation_steps gradient_accumulation accumulate_grad_batches",
    "train.attention": "attention_mechanism attn_mode",
    "train.caption_dropout": "caption_dropout_rate caption_dropout_probability proportion_empty_prompts",
    "train.prediction": "prediction_type v_parameterization v_pred",
    "train.wandb": "wandb_project log_tracker_name tracker_project_name",
    "train.log_every": "logging_steps",
    "train.keep_checkpoints": "checkpoints_total_limit save_last_n_steps save_total_limit",
    "train.output": "output_dir output_folder workspace_dir project_dir",
    "preview.prompts": "sample_prompts validation_prompt validation_prompts",
    "preview.seed": "validation_seed",
    "preview.guidance": "validation_guidance",
    "preview.steps": "validation_num_inference_steps",
}
"""Keys of other trainers that need no note, by our setting."""

_NOTED = (
    (
        "optim.lr",
        "learning_rate unet_lr lr_unet base_learning_rate unet_learning_rate",
        RATES,
    ),
    (
        "",
        "text_encoder_lr text_encoder_learning_rate train_text_encoder network_train_unet_only",
        "only the UNet is trained: leave it out",
    ),
    (
        "train.pairs_per_batch",
        "batch_size train_batch_size per_device_train_batch_size per_gpu_batch_size",
        f"It {_PAIRS}; for more of them in a step raise train.accumulation",
    ),
    (
        "train.steps",
        "max_train_steps max_steps num_train_steps iterations total_steps",
        "One step takes train.pairs_per_batch × train.accumulation pairs, and 1 pair is 2 images",
    ),
    (
        "train.epochs",
        "max_train_epochs num_train_epochs num_epochs epochs epoch",
        "One epoch takes every training pair once",
    ),
    (
        "train.min_snr_gamma",
        "min_snr_gamma snr_gamma",
        'It counts with train.timestep_weights = "min_snr"',
    ),
    (
        "train.precision",
        "mixed_precision train_dtype weight_dtype",
        "It is bf16 unless you say otherwise",
    ),
    (
        "train.precision",
        "full_bf16",
        'With adapter.kind = "full" use "pure_bf16"',
    ),
    (
        "data.resolution",
        "max_resolution image_size",
        "It is one number, the side of the square",
    ),
    (
        "train.checkpoint_every",
        "save_every_n_steps save_steps checkpointing_steps checkpoint_step_interval",
        "It counts steps",
    ),
    (
        "train.checkpoint_every",
        "save_every_n_epochs save_every",
        f"It counts steps: {_EPOCHS}",
    ),
    (
        "preview.every",
        "sample_every_n_steps validation_steps sample_after validation_step_interval",
        "It counts steps",
    ),
    (
        "preview.every",
        "sample_every_n_epochs validation_epochs",
        f"It counts steps: {_EPOCHS}",
    ),
    (
        "data.source",
        "train_data_dir instance_data_dir data_backend_config dataset_name dataset_config image_dir",
        "A folder of pairs, chosen/ + rejected/: see docs/data.md",
    ),
    (
        "data.cache",
        "cache_dir cache_dir_root",
        "prepare fills it with latents and prompt embeddings",
    ),
    (
        "",
        "cache_latents cache_latents_to_disk cache_text_encoder_outputs "
        "cache_text_encoder_outputs_to_disk latent_caching vae_batch_size",
        "prepare always caches latents and prompt embeddings: leave it out",
    ),
    (
        "optim.name",
        "optimizer_type optimizer",
        'It is "adamw", "adamw8bit" or "adafactor"',
    ),
    (
        "optim.name",
        "use_8bit_adam",
        'Set it to "adamw8bit"',
    ),
    (
        "optim.betas",
        "adam_beta1 adam_beta2",
        "It holds both, such as [0.9, 0.999]",
    ),
    (
        "",
        "optimizer_args",
        "each has a setting of its own: optim.betas, optim.eps, optim.weight_decay",
    ),
    (
        "optim.warmup_steps",
        "lr_warmup_steps learning_rate_warmup_steps warmup_ratio lr_warmup_ratio",
        "It counts steps",
    ),
    (
        "train.attention",
        "xformers enable_xformers_memory_efficient_attention mem_eff_attn",
        'Set it to "xformers", or leave it out: "sdpa" is torch\'s own and the default',
    ),
    (
        "train.attention",
        "sdpa",
        'Leave it out: "sdpa" is the default',
    ),
    (
        "train.zero_terminal_snr",
        "rescale_betas_zero_snr zero_snr",
        'It is "auto", "on" or "off"',
    ),
    (
        "adapter.kind",
        "network_module model_type training_method train_type",
        'It is "lora" or "full"',
    ),
    (
        "adapter.base",
        "fp8_base base_model_precision quantize_base",
        'It is "dense", "int8", "nf4" or "fp8"',
    ),
    (
        "export.dtype",
        "save_precision output_dtype",
        "It is for a full fine-tune's single file",
    ),
    (
        "objective.beta",
        "beta_dpo",
        "It is Diffusion-DPO's with objective.name = \"dpo\"; MaPO's default is 0.1",
    ),
    (
        "objective.name",
        "loss_type loss",
        'It is "mapo", "dpo", "kto" or another of docs/objectives.md',
    ),
    (
        "",
        "debiased_estimation_loss noise_offset multires_noise_iterations input_perturbation",
        "no objective here takes it: leave it out",
    ),
    (
        "",
        "output_name output_model_destination save_model_as",
        "files are named by the trainer, and mapo-fast export writes other layouts: leave it out",
    ),
    (
        "",
        "resume resume_from_checkpoint resume_from",
        "continue a run with --resume on the command line",
    ),
    (
        "",
        "logging_dir log_with report_to log_prefix",
        "log.jsonl and TensorBoard figures are always written into train.output, and "
        "train.wandb mirrors them: leave it out",
    ),
    (
        "",
        "caption_extension caption_ext shuffle_caption keep_tokens",
        "captions are read as they are from .txt or .caption files next to the images: leave it out",
    ),
    (
        "",
        "enable_bucket min_bucket_reso max_bucket_reso bucket_no_upscale center_crop random_crop",
        "every pair gets the nearest of SDXL's shapes, and data.max_crop limits the crop: leave it out",
    ),
    (
        "",
        "clip_skip",
        "prompts are encoded as SDXL does: leave it out",
    ),
    (
        "",
        "max_data_loader_n_workers dataloader_num_workers persistent_data_loader_workers",
        "speed.prefetch reads ahead by default: leave it out",
    ),
    (
        "",
        "network_dropout network_args lora_dropout",
        "a LoRA here has no such option: leave it out",
    ),
    (
        "",
        "lowram medvram highvram",
        "train.vram sets the memory to stay within, and the plan follows: leave it out",
    ),
)
"""Our setting or none, keys of other trainers, and a note."""

FOREIGN = (
    *(Foreign(name, ours) for ours, names in _ALIKE.items() for name in names.split()),
    *(Foreign(name, ours, note) for ours, names, note in _NOTED for name in names.split()),
)
_BY_NAME = {entry.name: entry for entry in FOREIGN}
