"""S2 attention behind one signature: reference, torch and (on CUDA) Triton backends."""
