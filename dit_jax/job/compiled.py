"""Compiled programs kept on disk, so that a restarted job, or a cell of the same size, compiles nothing."""

from absl import flags

from dit_jax.files import absolute, remote


def define_flag() -> None:
    """Define `--compilation_cache`."""
    flags.DEFINE_string("compilation_cache", None, "folder in which compiled programs are kept for the next start")


def keep_programs() -> None:
    """Use the folder of `--compilation_cache`, if there is one."""
    if folder := getattr(flags.FLAGS, "compilation_cache", None):
        use_cache(folder)


def use_cache(folder: str) -> None:
    """Keep compiled programs in `folder`, however small they are. In a bucket XLA's own caches for GPUs stay off: it opens local files."""
    import jax

    jax.config.update("jax_compilation_cache_dir", absolute(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    if remote(folder):
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
