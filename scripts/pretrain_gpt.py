"""Pretrains a GPT: `torchrun … scripts/pretrain_gpt.py <Megatron flags> <--s2-… flags>`."""

if __name__ == "__main__":
    # Saving a checkpoint starts a helper process that imports this file again; it needs none of this.
    from megatron_s2.pretrain import main

    main()
