"""gray_scott_reaction_diffusion: patterns of two reacting, diffusing species on a periodic square.

    A_t = d_A lap A - A B^2 + F (1 - A),    B_t = d_B lap B + A B^2 - (F + k) B      (Pearson 1993, Science 261)

The Well has d_A = 2e-5, d_B = 1e-5 on [-1, 1)^2 with 128 points. With n points both are multiplied by (128 / n)^2: the
same physics at the same points per wavelength, in a box that holds fewer of the patterns.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from data_pipeline.miniwell.spectral import Etdrk4, FourierGrid
from data_pipeline.miniwell.system import PERIODIC, ParameterSet, Preset, Simulation, System, counts, snapshots
from data_pipeline.well.layout import edges

DIFFUSION = np.array([2e-5, 1e-5])  # of A and B at 128 points
TIME_STEP = 2.5  # off by at most 8e-3 after 400 time units; 5.0 is off by up to 0.08 in spots
LIVE_STD = 1e-3  # a trajectory whose A varies less than this over space at the end is dead, and drawn again
MAX_DRAWS = 20


def evolve(
    start: np.ndarray, feed: float, kill: float, num_frames: int, dt: float, step: float = TIME_STEP
) -> np.ndarray:
    """Integrate A and B (b, 2, X, Y) over `num_frames` frames `dt` apart, the first being `start`: (b, T, 2, X, Y)."""
    size = start.shape[-1]
    grid = FourierGrid((size, size), (2.0, 2.0))
    diffusion = (DIFFUSION * (128 / size) ** 2)[:, None, None]
    decay = np.array([feed, feed + kill])[:, None, None]
    stepper = Etdrk4.of(-diffusion * grid.k_squared - decay, step)
    mask = grid.dealias
    supply = feed * size**2  # the constant F lives in the mean mode of A alone

    def reaction(coefficients: np.ndarray) -> np.ndarray:
        a, b = np.moveaxis(grid.inverse(coefficients), 1, 0)
        rate = grid.forward(a * b * b) * mask
        terms = np.stack([-rate, rate], axis=1)
        terms[:, 0, 0, 0] += supply
        return terms

    steps = round(dt / step)
    _, *later = snapshots(grid.forward(start), lambda state: stepper.advance(state, reaction), num_frames, steps)
    return np.stack([start, *map(grid.inverse, later)], axis=1)


def _blobs(rng: np.random.Generator, size: int, count: tuple[int, int], width: tuple[float, float]) -> np.ndarray:
    """Return a sum of Gaussians of height 1 at random places of the periodic square, (X, Y); widths for 64 points."""
    scale = 64 / size
    number = max(2, round(rng.integers(count[0], count[1] + 1) / scale**2))
    points = -1 + 2 * np.arange(size) / size
    total = np.zeros((size, size))
    for _ in range(number):
        center = rng.uniform(-1, 1, size=2)
        spread = rng.uniform(*width) * scale
        bump_x, bump_y = (np.exp(-0.5 * (((points - c + 1) % 2 - 1) / spread) ** 2) for c in center)
        total += bump_x[:, None] * bump_y
    return np.minimum(total, 1.0)


def start_blobs(rng: np.random.Generator, size: int) -> np.ndarray:
    """Return Gaussian patches of B in a sea of A, (2, X, Y)."""
    bumps = _blobs(rng, size, (6, 20), (0.06, 0.14))
    return np.stack([1 - 0.5 * bumps, 0.25 * bumps])


def start_holes(rng: np.random.Generator, size: int) -> np.ndarray:
    """Return holes in the B-rich state, which grow into bubbles; patches in the B-poor state die at these F, k."""
    bumps = _blobs(rng, size, (4, 14), (0.05, 0.12))
    return np.stack([0.43 + 0.57 * bumps, 0.36 * (1 - bumps)])


def start_fourier(rng: np.random.Generator, size: int) -> np.ndarray:
    """Return white noise low-passed at wavenumber index 6 (of the box of 64 points), (2, X, Y)."""
    grid = FourierGrid((size, size), (2 * np.pi, 2 * np.pi))
    noise = grid.forward(rng.standard_normal((size, size)))
    z = grid.inverse(noise * np.exp(-grid.k_squared / (6 * size / 64) ** 2))
    z = (z - z.min()) / (z.max() - z.min())
    return np.stack([1 - 0.5 * z, 0.35 * z**2])


def start_either(rng: np.random.Generator, size: int) -> np.ndarray:
    """Return patches or noise, with equal probability."""
    return (start_blobs if rng.random() < 0.5 else start_fourier)(rng, size)


STARTS: Mapping[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "blobs": start_blobs,
    "holes": start_holes,
    "fourier": start_fourier,
    "either": start_either,
}


def simulate(preset: Preset, parameter_set: ParameterSet, rngs: Sequence[np.random.Generator]) -> Simulation:
    """Simulate trajectories that still have a pattern at the end; others are drawn again from their own generator."""
    size = preset.grid[0]
    draw = STARTS[str(parameter_set.options["start"])]
    feed, kill = parameter_set.scalars["F"], parameter_set.scalars["k"]
    frames = np.empty((len(rngs), preset.num_frames, 2, size, size))
    dead = list(range(len(rngs)))
    for _ in range(MAX_DRAWS):
        start = np.stack([draw(rngs[index], size) for index in dead])
        frames[dead] = evolve(start, feed, kill, preset.num_frames, preset.dt)
        dead = [index for index in dead if frames[index, -1, 0].std() < LIVE_STD]
        if not dead:
            break
    else:
        raise RuntimeError(f"gray_scott {parameter_set.label}: no live trajectory in {MAX_DRAWS} draws")
    x, y = FourierGrid((size, size), (2.0, 2.0)).points((-1.0, -1.0))
    return Simulation(
        time=preset.times,
        x=x,
        y=y,
        fields={"A": frames[:, :, 0], "B": frames[:, :, 1]},
        boundaries=edges(PERIODIC, preset.grid),
    )


def _set(pattern: str, feed: float, kill: float, start: str, *trajectories: int) -> ParameterSet:
    label, scalars = f"{pattern}_F_{feed}_k_{kill}", {"F": feed, "k": kill}
    return ParameterSet(label, scalars, counts(*trajectories), {"start": start})


SYSTEM = System(
    name="gray_scott_reaction_diffusion",
    tensor_orders={"A": 0, "B": 0},
    presets={
        "mini": Preset(
            grid=(64, 64),
            num_frames=41,
            dt=40.0,
            parameter_sets=(
                _set("gliders", 0.014, 0.054, "blobs", 2, 0, 2),
                _set("bubbles", 0.098, 0.057, "holes", 2, 1, 1),
                _set("maze", 0.029, 0.057, "either", 2, 0, 1),
                _set("worms", 0.058, 0.065, "fourier", 2, 0, 1),
                _set("spirals", 0.018, 0.051, "either", 2, 1, 2),
                _set("spots", 0.03, 0.062, "either", 2, 0, 1),
            ),
        ),
        "tiny": Preset(
            grid=(32, 32),
            num_frames=9,
            dt=40.0,
            parameter_sets=(
                _set("maze", 0.029, 0.057, "either", 1, 1, 1),
                _set("spots", 0.03, 0.062, "either", 2, 1, 1),
            ),
        ),
    },
    simulate=simulate,
    cost=4.0,
)
