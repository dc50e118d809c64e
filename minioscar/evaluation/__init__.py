"""What measures fidelity: teacher-forced decoding, drift, passkeys, inspection, and the published baselines."""
