"""``test``: scores on the held-out splits, the media-swap test, and the report. ``fit`` ends with the same."""

from __future__ import annotations

import torch
from omegaconf import DictConfig

from omnitrain.cli.experiment import Experiment, build, trained_checkpoint


def run(cfg: DictConfig) -> None:
    """Score the checkpoint that `cfg` names, and write the report into the run folder."""
    checkpoint = trained_checkpoint(cfg, "test")
    experiment = build(cfg, "test")
    if checkpoint is not None:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
        experiment.module.load_state_dict(state)
    if experiment.trainer.is_global_zero:
        evaluate_and_report(experiment, cfg.evaluation)


def evaluate_and_report(experiment: Experiment, settings: DictConfig) -> None:
    """Score the model as it stands on `data.test_sources`, print the table, write ``report.html`` and name it.

    Args:
        settings: arguments of `evaluation.heldout.evaluate` beside the switches `after_fit` and `report`.
    """
    from omnitrain.evaluation.heldout import evaluate, print_table
    from omnitrain.evaluation.report import write_report

    options = {str(key): value for key, value in settings.items() if key not in ("after_fit", "report")}
    data, trainer = experiment.datamodule, experiment.trainer
    model = experiment.module.model.to(trainer.strategy.root_device)
    with trainer.precision_plugin.forward_context():
        scores = evaluate(
            model,
            data.encoder,
            data.tokenizer,
            data.opened("test_sources"),
            experiment.run_dir / "eval",
            train_sources=data.opened("sources"),
            **options,
        )
    print_table(scores)
    if settings.report:
        print(f"report: {write_report(experiment.run_dir)}", flush=True)
