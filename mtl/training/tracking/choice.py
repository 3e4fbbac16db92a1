"""Which class shows a run."""

from __future__ import annotations

from mtl.config import RunConfig, SettingError, TrackingConfig, mistake_of
from mtl.config.own import checked_options, is_own, own_class
from mtl.data.files.extras import from_extra
from mtl.training.tracking.backend import TrackingBackend


def backend_class(config: TrackingConfig) -> type[TrackingBackend] | None:
    """The class of a run's backend; None if there is none.

    Raises:
        SettingError: A class of the user's own cannot be imported, is no backend, or does not take its options; or a
            package is missing.
    """
    if config.is_off:
        return None
    if is_own(config.backend):
        kind: type[TrackingBackend] = own_class(config.backend, "tracking.backend", TrackingBackend)
        checked_options(kind, config.options, "tracking.options")
        return kind
    if config.backend == "tensorboard":
        with from_extra("tensorboard", "tensorboard needs the package tensorboard", "tracking.backend"):
            from mtl.training.tracking.tensorboard_backend import TensorboardBackend
        return TensorboardBackend
    from mtl.training.tracking.wandb_backend import WandbBackend

    return WandbBackend


def check_backend(config: RunConfig) -> None:
    """Raises `ConfigError` if the class that shall show a run cannot be had."""
    try:
        backend_class(config.tracking)
    except SettingError as error:
        raise mistake_of(config, error) from error
