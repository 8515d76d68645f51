"""What Megatron's parser returns for a command line, as far as the checks of data and paths read it."""

from argparse import Namespace


def arguments(**given) -> Namespace:
    names = (
        "data_path train_data_path valid_data_path test_data_path data_args_path per_split_data_args_path "
        "split load save pretrained_checkpoint tokenizer_model vocab_file merge_file use_checkpoint_args "
        "per_dataset_sequences_path wandb_project wandb_exp_name wandb_save_dir vocab_size padded_vocab_size "
        "result_rejected_tracker_filename heterogeneous_layers_config_path"
    )
    return Namespace(**{**dict.fromkeys(names.split()), "tokenizer_type": "NullTokenizer", **given})
