"""TensorBoard's Custom Scalars page. Its first part answers: is it learning, on all datasets, how fast, until when?"""

from collections.abc import Iterable
from typing import Any


def custom_scalars(datasets: Iterable[str], windows: Iterable[str]) -> dict[str, Any]:
    """Titles of the charts and the tags in them; `windows` are the rollout windows of the validation protocol."""
    names = sorted(datasets)

    def by_dataset(template: str) -> list[Any]:
        # tags are regular expressions, and one dataset's name may begin with another's
        return ["Multiline", [template.format(name) + "$" for name in names]]

    def one(*tags: str) -> list[Any]:
        return ["Multiline", [f"{tag}$" for tag in tags]]

    return {  # three charts a row
        "is it learning, on all datasets, how fast, until when": {
            "one-step VRMSE / persistence (1: no better)": by_dataset("valid_over_persistence/{}"),
            "the same, geometric mean over datasets": one("valid_over_persistence/geometric_mean"),
            "training loss by dataset": by_dataset("train_loss/{}"),
            "training loss and its terms": one("train/loss", "train/mse", "train/wavelet_l1"),
            "tokens per second": one("throughput/tokens_per_s"),
            "hours left": one("throughput/hours_left"),
        },
        "learning": {
            "one-step VRMSE (valid)": by_dataset("valid_vrmse/{}"),
            "gradient norm before clipping": one("train/grad_norm"),
            "learning rate": one("train/lr"),
        },
        "rollout VRMSE (valid)": {window: by_dataset("rollout_vrmse/{}/" + window) for window in windows},
        "speed": {
            "samples per second": one("throughput/samples_per_s"),
            "share of time waiting for data": one("throughput/data_wait_fraction"),
            "peak memory, GB": one("throughput/peak_memory_gb"),
        },
        "sampling": {
            "target share": by_dataset("sampling/target_share/{}"),
            "passes over the data": by_dataset("sampling/passes/{}"),
        },
        "target share and share drawn so far": {
            name: one(*(f"sampling/{kind}_share/{name}" for kind in ("target", "drawn"))) for name in names
        },
    }
