# SPDX-License-Identifier: GPL-3.0-or-later
"""Plan to Crazyradio over cflib: arming, take-off, setpoint guard, landing."""
