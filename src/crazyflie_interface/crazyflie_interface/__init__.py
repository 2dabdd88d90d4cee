"""Plan to Crazyradio over cflib: arming, take-off, setpoint guard, landing."""
