"""active_matter: a dense suspension of active rods in a Stokes fluid, doubly periodic, x and y in [0, 10).

The moment model of Maddu, Weady & Shelley (arXiv:2308.06675, the Well's source): concentration c, second moment D with
tr D = c, fourth moment S, E = sym(grad u), beta = 0.8, d_T = d_R = 0.1:

    c_t + u . grad c = d_T lap c
    D_t + u . grad D - (grad u D + D grad u^T) + 2 S:E = 4 zeta (D.D - S:D) + d_T lap D - 4 d_R (D - c I / 2)
    -lap u + grad P = div [alpha D + beta S:E - 2 zeta beta (D.D - S:D)],   div u = 0

The unknowns are c, a = (D_xx - D_yy) / 2 and d = D_xy, so tr D = c holds exactly; only the traceless parts of the
stresses move the fluid. In 2D the Bingham closure is one function of one number: with q = <e^{2 i theta}>,
<e^{4 i theta}> = q^2 h(|q|^2). Time: SBDF2, diffusion and decay implicit; space: Fourier, 2/3 rule.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
from scipy.special import ive

from data_pipeline.miniwell.spectral import FourierGrid
from data_pipeline.miniwell.system import PERIODIC, ParameterSet, Preset, Simulation, System, counts
from data_pipeline.well.layout import edges

LENGTH = 10.0
BETA, D_T, D_R = 0.8, 0.1, 0.1
STOKES_ITERATIONS = 2  # of the fixed point, from the last step's flow: 1.5e-3 relative
MAX_START_ORDER = 0.05


@cache
def closure_table(points: int = 4097) -> tuple[np.ndarray, np.ndarray]:
    """Return h and its increments at `points` equidistant |q|^2 in [0, 1], for linear interpolation.

    For the distribution exp(kappa cos 2 theta), q = I1 / I0 and <cos 4 theta> = I2 / I0, so h = I2 I0 / I1^2;
    h(0) = 1/2 and h(1) = 1.
    """
    kappa = np.geomspace(1e-3, 1e5, 40_000)
    q = ive(1, kappa) / ive(0, kappa)
    ratio = ive(2, kappa) / ive(0, kappa) / q**2
    table = np.interp(np.linspace(0, 1, points), np.concatenate([[0], q**2, [1]]), np.concatenate([[0.5], ratio, [1]]))
    return table, np.append(np.diff(table), 0.0)


def fourth_moment(c: np.ndarray, a: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return s1 + i s2 = c <e^{4 i theta}> by the Bingham closure; arrays of any one shape."""
    table, increments = closure_table()
    order = 4 * (a * a + d * d) / (c * c)  # |q|^2
    position = np.minimum(order, 1.0) * (len(table) - 1)
    index = position.astype(np.intp)
    h = table[index] + (position - index) * increments[index]
    weight = 4 * h / c  # c q^2 h = 4 (a + i d)^2 h / c
    return weight * (a * a - d * d), weight * (2 * a * d)


class ActiveMatter:
    """The equations on one grid; a state is (b, 3, X, Y // 2 + 1): coefficients of c, a, d."""

    def __init__(self, size: int, alpha: float, zeta: float) -> None:
        self.alpha, self.zeta = alpha, zeta
        self.grid = FourierGrid((size, size), (LENGTH, LENGTH))
        kx, ky, self.mask = self.grid.kx, self.grid.ky, self.grid.dealias
        self.derivatives = 1j * kx, 1j * ky
        self.shear, self.stretch = kx * ky, kx**2 - ky**2
        self.k_squared = self.grid.k_squared
        # k^4 psi (1 + beta / 8) = curl div (stress): the isotropic part of beta S:E, beta E / 4, stands on the left.
        self.stokes = self.mask * self.grid.inverse_k_squared**2 / (1 + BETA / 8)
        self.decay = np.stack([D_T * self.k_squared] + [D_T * self.k_squared + 4 * D_R] * 2)

    def strain(self, psi: np.ndarray) -> np.ndarray:
        """Return E_xx and E_xy, (b, 2, X, Y), of the flow u = psi_y, v = -psi_x."""
        return self.grid.inverse(np.stack([-self.shear * psi, 0.5 * self.stretch * psi], axis=1))

    def flow(self, state: np.ndarray, psi: np.ndarray, iterations: int = STOKES_ITERATIONS) -> np.ndarray:
        """Return the stream function (b, X, Y // 2 + 1) of the Stokes flow, by a fixed point in S:E from `psi` on."""
        c, a, d = np.moveaxis(self.grid.inverse(state), 1, 0)
        s1, s2 = fourth_moment(c, a, d)
        align1, align2 = alignment(c, a, d, s1, s2)
        steric = -2 * self.zeta * BETA
        fixed = np.stack([self.alpha * a + steric * align1, self.alpha * d + steric * align2], axis=1)
        for _ in range(iterations):
            e_xx, e_xy = np.moveaxis(self.strain(psi), 1, 0)
            contracted = np.stack(contract(c, s1, s2, e_xx, e_xy), axis=1)
            isotropic = 0.25 * np.stack([e_xx, e_xy], axis=1)
            stress1, stress2 = np.moveaxis(self.grid.forward(fixed + BETA * (contracted - isotropic)), 1, 0)
            psi = self.stokes * (2 * self.shear * stress1 - self.stretch * stress2)
        return psi

    def tendency(self, state: np.ndarray, psi: np.ndarray) -> np.ndarray:
        """Return all terms but diffusion and decay: advection, rotation, stretching and alignment."""
        dx, dy = self.derivatives
        flow = np.stack(
            [dy * psi, -dx * psi, self.k_squared * psi, -self.shear * psi, 0.5 * self.stretch * psi], axis=1
        )
        fields = self.grid.inverse(np.concatenate([state, flow], axis=1))
        c, a, d, u, v, vorticity, e_xx, e_xy = np.moveaxis(fields, 1, 0)
        s1, s2 = fourth_moment(c, a, d)
        align1, align2 = alignment(c, a, d, s1, s2)
        turned1, turned2 = contract(c, s1, s2, e_xx, e_xy)
        products = [u * c, u * a, u * d, v * c, v * a, v * d]
        products.append(c * e_xx - 2 * turned1 - vorticity * d + 4 * self.zeta * align1)
        products.append(c * e_xy - 2 * turned2 + vorticity * a + 4 * self.zeta * align2)
        coefficients = self.grid.forward(np.stack(products, axis=1))
        tendency = -dx * coefficients[:, :3] - dy * coefficients[:, 3:6]
        tendency[:, 1:] += coefficients[:, 6:]
        return tendency * self.mask

    def evolve(self, start: np.ndarray, num_frames: int, dt: float, step: float) -> np.ndarray:
        """Return (b, T, 7, X, Y): frames as `frame` returns them, `dt` apart; `start`, (b, 3, X, Y), is c, a, d."""
        steps = round(dt / step)
        state = self.grid.forward(start) * self.mask
        psi = self.flow(state, np.zeros_like(state[:, 0]), iterations=8)
        frames, before, tendency_before = [self.frame(state, psi)], None, None
        for _ in range(num_frames - 1):
            for _ in range(steps):
                tendency = self.tendency(state, psi)
                if before is None or tendency_before is None:
                    after = (state + step * tendency) / (1 + step * self.decay)
                else:
                    explicit = 4 * state - before + 2 * step * (2 * tendency - tendency_before)
                    after = explicit / (3 + 2 * step * self.decay)
                before, tendency_before, state = state, tendency, after
                psi = self.flow(state, psi)
            frames.append(self.frame(state, psi))
        return np.stack(frames, axis=1)

    def frame(self, state: np.ndarray, psi: np.ndarray) -> np.ndarray:
        """Return c, a, d, u, v, E_xx, E_xy on the grid, (b, 7, X, Y)."""
        dx, dy = self.derivatives
        velocity = self.grid.inverse(np.stack([dy * psi, -dx * psi], axis=1))
        return np.concatenate([self.grid.inverse(state), velocity, self.strain(psi)], axis=1)


def alignment(
    c: np.ndarray, a: np.ndarray, d: np.ndarray, s1: np.ndarray, s2: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return D.D - S:D, its (xx - yy) / 2 and xy parts."""
    return (c * a / 2 - (a * (c + s1) + d * s2) / 4), (c * d / 2 - (a * s2 + d * (c - s1)) / 4)


def contract(
    c: np.ndarray, s1: np.ndarray, s2: np.ndarray, e_xx: np.ndarray, e_xy: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return S:E for traceless E, its (xx - yy) / 2 and xy parts."""
    return (e_xx * (c + s1) + e_xy * s2) / 4, (e_xx * s2 + e_xy * (c - s1)) / 4


def start(rng: np.random.Generator, size: int) -> np.ndarray:
    """Return c, a, d (3, X, Y): concentration 1 with 5% modes, weak random order; 12 modes each, index up to 4.

    The Well starts from c = 1, which then stays 1 to rounding and cannot be normalized.
    """
    x, y = FourierGrid((size, size), (2 * np.pi, 2 * np.pi)).points((0.0, 0.0))
    fields = np.zeros((3, size, size))
    for field in fields:
        for _ in range(12):
            m, n = rng.integers(-4, 5, size=2)
            if m or n:
                field += rng.standard_normal() * np.cos(m * x[:, None] + n * y + rng.uniform(0, 2 * np.pi))
    fields[0] = 1 + 0.05 * fields[0] / fields[0].std()
    fields[1:] *= MAX_START_ORDER / 2 / np.sqrt((fields[1:] ** 2).sum(axis=0)).max()
    return fields


def simulate(preset: Preset, parameter_set: ParameterSet, rngs: Sequence[np.random.Generator]) -> Simulation:
    """Simulate concentration, velocity, D and E; D and E are full symmetric 2x2 tensors. See System.simulate."""
    size = preset.grid[0]
    model = ActiveMatter(size, parameter_set.scalars["alpha"], parameter_set.scalars["zeta"])
    starts = np.stack([start(rng, size) for rng in rngs])
    frames = model.evolve(starts, preset.num_frames, preset.dt, preset.options["time_step"])
    c, a, d, u, v, e_xx, e_xy = np.moveaxis(frames, 2, 0)
    x, y = model.grid.points((0.0, 0.0))
    return Simulation(
        time=preset.times,
        x=x,
        y=y,
        fields={
            "concentration": c,
            "velocity": np.stack([u, v], axis=-1),
            "D": symmetric(c / 2 + a, d, c / 2 - a),
            "E": symmetric(e_xx, e_xy, -e_xx),
        },
        boundaries=edges(PERIODIC, preset.grid),
    )


def symmetric(xx: np.ndarray, xy: np.ndarray, yy: np.ndarray) -> np.ndarray:
    """Return the symmetric tensors (..., 2, 2) with these components (...)."""
    return np.stack([np.stack([xx, xy], axis=-1), np.stack([xy, yy], axis=-1)], axis=-2)


def _set(alpha: float, zeta: float, *trajectories: int) -> ParameterSet:
    label, scalars = f"L_10_zeta_{zeta:g}_alpha_{alpha:g}", {"L": LENGTH, "zeta": zeta, "alpha": alpha}
    return ParameterSet(label, scalars, counts(*trajectories))


SYSTEM = System(
    name="active_matter",
    tensor_orders={"concentration": 0, "velocity": 1, "D": 2, "E": 2},
    presets={
        "mini": Preset(
            grid=(64, 64),
            num_frames=25,
            dt=0.3,
            options={"time_step": 0.0125},  # the alignment is explicit: 4 zeta dt must stay below 0.5
            parameter_sets=(_set(-3.0, 3.0, 5, 1, 4), _set(-5.0, 1.0, 3, 1, 4)),
        ),
        "tiny": Preset(
            grid=(32, 32),
            num_frames=9,
            dt=0.5,
            options={"time_step": 0.025},
            parameter_sets=(_set(-3.0, 1.0, 1, 1, 1), _set(-5.0, 1.0, 1, 0, 1)),
        ),
    },
    simulate=simulate,
    cost=7.0,
)
