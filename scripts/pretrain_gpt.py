"""Pretrains a GPT: `torchrun … scripts/pretrain_gpt.py <Megatron flags> <--s2-… flags>`."""

from megatron_s2.pretrain import main

if __name__ == "__main__":
    main()
