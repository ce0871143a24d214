"""`megatron-sse inspect`: print what a checkpoint holds and whether it is intact."""

from megatron_sse.checkpoint.folders import named_checkpoint, why_unusable
from megatron_sse.checkpoint.manifest import Manifest, find_damage, read_manifest
from megatron_sse.checkpoint.names import INDEX
from megatron_sse.checkpoint.request import Request
from megatron_sse.visible import size_of

_DAMAGED_EXIT = 1


def run(request: Request) -> int:
    """Print what a checkpoint holds; return 0, or 1 where it is damaged. Raises UserError where there is none."""
    hashes = not request.sizes
    path = named_checkpoint("DIR", request.checkpoint)
    manifest = read_manifest(path)
    print("\n".join([str(path), *_describe(manifest)]), flush=True)
    damaged = {name: find_damage(path, manifest, [name], hashes) for name in manifest.files}
    wrong = [line for lines in damaged.values() for line in lines]
    lines: list[str] = []
    # Imported late: torch, without which the description and the hashes can do.
    from megatron_sse.checkpoint.tensors import describe_tensors
    from megatron_sse.checkpoint.verify import find_missing

    # A file whose hash is wrong, or is not known, is not opened.
    intact = [name for name in damaged if not damaged[name]]
    wrong += [line for line in find_missing(path, manifest, intact) if line not in wrong]
    if INDEX in intact:
        lines += ["", *describe_tensors(path, request.tensors)]
    lines += ["", *_describe_files(manifest, damaged)]
    checked = "sizes and hashes" if hashes else "sizes, and hashes below 1 MiB,"
    if reason := why_unusable(path):
        lines += ["", f"not resumed from without being named: {reason}"]
    lines += ["", *(wrong or [f"{checked} of all files match the manifest"])]
    print("\n".join(lines))
    return _DAMAGED_EXIT if wrong else 0


def _describe(manifest: Manifest) -> list[str]:
    layout = ", ".join(f"{name} {_show(value)}" for name, value in manifest.layout.items())
    return [
        f"  step               {manifest.step}",
        f"  samples            {manifest.consumed_samples}",
        f"  holds              {'weights and optimizer' if manifest.optimizer else 'weights only'}",
        f"  saved at           {layout}",
        f"  written by         {', '.join(f'{name} {version}' for name, version in manifest.versions.items())}",
        f"  size               {size_of(manifest.size())} in {len(manifest.files)} files",
    ]


def _describe_files(manifest: Manifest, damaged: dict[str, list[str]]) -> list[str]:
    lines = [f"  {'file':<24}{'size':>12}  {'SHA-256':<64}  state"]
    for name, entry in manifest.files.items():
        state = "damaged" if damaged[name] else "intact"
        lines.append(f"  {name:<24}{size_of(entry.size):>12}  {entry.sha256}  {state}")
    return lines


def _show(value: object) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)
