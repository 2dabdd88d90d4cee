"""A stirred tank with cooling jacket (Klatt and Engell): A -> B -> C, 2 A -> D, with two uncertain rate coefficients.

State x (8): concentrations c_A, c_B (mol/l), temperatures of tank and jacket T_R, T_K (degC), the inputs of the step
before, F (dilution rate) and Q (heat flow into the jacket), in per cent of their ranges 5 .. 40 1/h and -8500 .. 0
kJ/h, and two coefficients that stand still, theta_a and theta_b. Input u (2): changes of F and Q (per cent), which
then hold over the step. Time is in hours; the benchmark's step is 0.005 h.

  k1 = beta k_ab exp(-E_ab/(T_R + 273.15))   k2 = k_ab exp(-E_ab/(T_R + 273.15))   k3 = k_ad exp(-alpha E_ad/(..))
  alpha = 0.95 (1 + theta_a)   beta = 1 + theta_b
  c_A' = F (c_A0 - c_A) - k1 c_A - k3 c_A^2          c_B' = -F c_B + k1 c_A - k2 c_B
  T_R' = -(k1 c_A H_ab + k2 c_B H_bc + k3 c_A^2 H_ad) / (rho c_p) + F (T_0 - T_R) + W (T_K - T_R) / (rho c_p V)
  T_K' = (Q + W (T_R - T_K)) / (m_K c_pK),   W = k_w A_R

The coefficients are states so that the derivative of a plan with respect to its first state is also that with respect
to them. Constants and the form of the uncertainty: Brandner, Gros and Lucia, Computationally efficient Gauss-Newton
reinforcement learning for model predictive control.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from deqmpc.dynamics.equations import Scalars, exp

INPUT_LOW = (5.0, -8500.0)  # of F (1/h) and Q (kJ/h), 0 %
INPUT_HIGH = (40.0, 0.0)  # 100 %


@dataclass(frozen=True)
class StirredTank:
    """The equations above."""

    k_ab: float = 1.287e12  # 1/h, of A -> B and B -> C
    k_ad: float = 9.043e9  # l/(mol h), of 2 A -> D
    e_ab: float = 9758.3  # K, activation energy over the gas constant
    e_ad: float = 8560.0  # K
    h_ab: float = 4.2  # kJ/mol, reaction heats
    h_bc: float = -11.0  # kJ/mol
    h_ad: float = -41.85  # kJ/mol
    density: float = 0.9342  # kg/l, rho
    heat_capacity: float = 3.01  # kJ/(kg K), c_p
    volume: float = 10.01  # l, V
    jacket_mass: float = 5.0  # kg, m_K
    jacket_heat_capacity: float = 2.0  # kJ/(kg K), c_pK
    exchange: float = 4032.0 * 0.215  # kJ/(h K), W
    inflow_concentration: float = 5.1  # mol/l, c_A0
    inflow_temperature: float = 130.0  # degC, T_0
    n = 8
    m = 2
    jump: ClassVar[tuple[tuple[int, int], ...]] = ((4, 0), (5, 1))

    def derivative(self, x: Scalars, u: Scalars) -> list:
        """dx/dt (8 scalars, per hour) at state x under the changed inputs."""
        c_a, c_b, t_r, t_k = x[:4]
        F, Q = (low + 0.01 * (high - low) * (held + change)
                for low, high, held, change in zip(INPUT_LOW, INPUT_HIGH, x[4:6], u, strict=True))
        inverse = 1.0 / (t_r + 273.15)
        k2 = self.k_ab * exp(-self.e_ab * inverse)
        k1 = (1.0 + x[7]) * k2
        k3 = self.k_ad * exp(-0.95 * self.e_ad * (1.0 + x[6]) * inverse)
        ab, bc, ad = k1 * c_a, k2 * c_b, k3 * c_a * c_a  # mol/(l h)
        by_capacity = 1.0 / (self.density * self.heat_capacity)
        heat = (ab * self.h_ab + bc * self.h_bc + ad * self.h_ad) * by_capacity
        cooling = self.exchange * (t_r - t_k)
        return [
            F * (self.inflow_concentration - c_a) - ab - ad,
            -F * c_b + ab - bc,
            F * (self.inflow_temperature - t_r) - heat - cooling * (by_capacity / self.volume),
            (Q + cooling) * (1.0 / (self.jacket_mass * self.jacket_heat_capacity)),
            0.0, 0.0, 0.0, 0.0,
        ]
