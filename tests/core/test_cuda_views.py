"""The kernel that draws and makes views on GPUs, beside the views of the CPU, torchvision and numpy.

Without a GPU its source runs on the host (see `kernel_on_host`); the same tests run on CUDA where there is one.
"""

from __future__ import annotations

import ctypes
import re
import threading
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import kernel_on_host as host
import pytest
import torch
from kernel_on_host import Machine, Operations
from kernel_reference import (
    BLUR,
    BOX,
    EVERYTHING,
    FACTORS,
    FLIP,
    GRAYSCALE,
    HUE,
    ORDER,
    SEED,
    SIGMA_AT,
    SOLARIZE,
    assert_close,
    drawn,
    from_cpu,
    on,
    replace_probability,
    stream,
)
from test_views import ALL, PLAIN, ZSCORE, generator, random_images
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from headsearch.config import ViewsConfig
from headsearch.core import cuda_driver, cuda_views, views
from headsearch.core.cuda_views import Arguments
from headsearch.core.draws import COLUMNS, Draws
from headsearch.core.randomness import Philox, derive_seed
from headsearch.core.views import Views, kernel_size


class TestPixels:
    @pytest.mark.parametrize("size", [8, 32, 33, 64, 96])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("channels_last", [False, True])
    def test_given_parameters_make_the_views_of_the_cpu(
        self, machine: Machine, size: int, dtype: torch.dtype, channels_last: bool
    ) -> None:
        images, count = random_images(16, size), 48
        on_cpu = Views(EVERYTHING, size, ZSCORE)
        draws = on_cpu.draw(count, generator(size))
        ours = machine.views(EVERYTHING, size, normalization=ZSCORE, dtype=dtype, channels_last=channels_last)
        made = ours.apply(images.to(machine.device), on(machine.device, draws))
        assert made.dtype == dtype
        assert made.shape == (count, 3, size, size)
        assert made.is_contiguous(
            memory_format=torch.channels_last if channels_last else torch.contiguous_format
        )
        assert_close(made, on_cpu._apply_fused(images, draws), threshold=1e-4)
        exact = machine.views(EVERYTHING, size, normalization=ZSCORE)
        assert torch.equal(made, exact.apply(images.to(machine.device), on(machine.device, draws)).to(dtype))

    @pytest.mark.parametrize(
        "changed",
        [
            {},
            {"flip": torch.ones(8, dtype=torch.bool)},
            {"box": torch.tensor([[3.0, 5.0, 1.0, 1.0], [30.0, 31.0, 2.0, 1.0], [0.0, 0.0, 32.0, 9.0]] + [[7.0, 2.0, 16.0, 21.0]] * 5)},
            {"factors": torch.tensor([[0.4, 1.0, 1.0]] * 4 + [[1.8, 1.0, 1.0]] * 4)},
            {"factors": torch.tensor([[1.0, 0.0, 1.0]] * 4 + [[1.0, 2.6, 1.0]] * 4)},
            {"factors": torch.tensor([[1.0, 1.0, 0.0]] * 4 + [[1.0, 1.0, 1.7]] * 4)},
            {"hue": torch.linspace(-0.5, 0.5, 8)},
            {"grayscale": torch.ones(8, dtype=torch.bool)},
            {"blur": torch.ones(8, dtype=torch.bool), "sigma": torch.linspace(0.1, 2.0, 8)},
            {"solarize": torch.ones(8, dtype=torch.bool)},
        ],
        ids=["nothing", "flip", "crop", "brightness", "contrast", "saturation", "hue", "grayscale", "blur", "solarize"],
    )  # fmt: skip
    def test_each_operation_by_itself_is_that_of_the_cpu(self, machine: Machine, changed: dict) -> None:
        images, no = random_images(8, 32), torch.zeros(8, dtype=torch.bool)
        draws = replace(
            Draws(
                view=torch.arange(8), box=torch.tensor([[0.0, 0.0, 32.0, 32.0]] * 8), flip=no, factors=torch.ones(8, 3),
                order=torch.arange(3).repeat(8, 1), hue=torch.zeros(8), grayscale=no, blur=no, sigma=torch.ones(8),
                solarize=no,
            ),
            **changed,
        )  # fmt: skip
        expected = Views(EVERYTHING, 32, PLAIN)._apply_fused(images, draws)
        unchanged = (expected - images.float() / 255).abs().amax((1, 2, 3)) < 1e-6
        assert bool(unchanged.all()) == (not changed)
        ours = machine.views(EVERYTHING, 32, normalization=PLAIN)
        assert_close(ours.apply(images.to(machine.device), on(machine.device, draws)), expected)

    def test_what_a_stream_draws_is_what_is_made_in_every_order(self, machine: Machine) -> None:
        images = random_images(50, 32)
        ours = machine.views(EVERYTHING, 32, normalization=ZSCORE, channels_last=True)
        table = drawn(ours, stream(machine), 400)
        made = ours._make(images.to(machine.device), 400, stream(machine))
        assert len({tuple(row) for row in table[:, ORDER].tolist()}) == 24
        assert_close(made, from_cpu(images, table, EVERYTHING, ZSCORE), threshold=1e-4)

    @pytest.mark.parametrize("blurs", [False, True])
    @pytest.mark.parametrize("size", [128, 160, 224])
    def test_large_views_are_made_in_scratch_memory(self, machine: Machine, size: int, blurs: bool) -> None:
        config = replace_probability(EVERYTHING, blur_probability=0.7 if blurs else 0.0)
        images = random_images(6, size)
        ours = machine.views(config, size, normalization=ZSCORE, dtype=torch.bfloat16, channels_last=True)
        table = drawn(ours, stream(machine), 12, firsts=6)
        made = ours.pair(images.to(machine.device), stream(machine))
        assert_close(made, from_cpu(images, table, config, ZSCORE), threshold=1e-4)

    def test_each_block_has_scratch_memory_of_its_own(self, machine: Machine) -> None:
        real, seen = machine.launcher.launcher, []

        class Marking:
            def launch(self, arguments: Arguments, tensors: dict[str, Tensor], *shape: int) -> None:
                seen.append(tensors["scratch"].fill_(-7.0))
                real.launch(arguments, tensors, *shape)

        machine.launcher.launcher = Marking()
        ours = machine.views(replace_probability(EVERYTHING, blur_probability=1.0), 240, normalization=ZSCORE)
        ours(random_images(6, 240)[:4].to(machine.device), stream(machine))
        (scratch,) = seen
        assert scratch.shape == (4, 4 * 240 * 240)
        assert (scratch != -7.0).all()

    def test_images_that_lie_otherwise_in_memory_give_the_same_views(self, machine: Machine) -> None:
        images = random_images(10, 16).to(machine.device)
        ours = machine.views(ALL, 16, normalization=PLAIN)
        expected = ours.pair(images, stream(machine))
        assert torch.equal(
            ours.pair(images.contiguous(memory_format=torch.channels_last), stream(machine)), expected
        )
        assert torch.equal(ours.pair(images.repeat(1, 1, 1, 2)[..., :16], stream(machine)), expected)

    def test_other_images_are_refused(self, machine: Machine) -> None:
        ours = machine.views(ALL, 16, normalization=PLAIN)
        for images in (
            torch.zeros(2, 3, 16, 16, device=machine.device),
            torch.zeros(2, 3, 16, 8, dtype=torch.uint8, device=machine.device),
            torch.zeros(2, 1, 16, 16, dtype=torch.uint8, device=machine.device),
            torch.zeros(2, 3, 16, 16, dtype=torch.uint8, device="meta"),
        ):
            with pytest.raises(ValueError, match=r"expected torch.uint8 \(B, 3, 16, 16\)"):
                ours.pair(images, stream(machine))

    @pytest.mark.parametrize("count", [0, 1, 3])
    def test_any_number_of_images(self, machine: Machine, count: int) -> None:
        ours = machine.views(ALL, 8, normalization=ZSCORE, dtype=torch.bfloat16)
        images = random_images(6, 8)[:count].to(machine.device)
        assert ours(images, stream(machine)).shape == (count, 3, 8, 8)
        assert ours.pair(images, stream(machine)).shape == (2 * count, 3, 8, 8)


class TestLaunches:
    @pytest.mark.parametrize("config", [ViewsConfig(), EVERYTHING], ids=["no blur", "blur"])
    def test_a_pair_is_two_launches_and_waits_for_nothing(
        self, machine: Machine, config: ViewsConfig
    ) -> None:
        ours = machine.views(config, 32, normalization=ZSCORE, dtype=torch.bfloat16, channels_last=True)
        images, source = random_images(64, 32).to(machine.device), ours.stream(0, "views")
        ours.pair(images, source)
        before = machine.launcher.launches
        with machine.no_waiting(), Operations() as operations:
            made = ours.pair(images, source)
        assert machine.launcher.launches == before + 1
        assert operations.names == ["add_"]
        assert torch.isfinite(made).all()
        assert source.get_state()[1] == 2

    @pytest.mark.parametrize("size", [32, 160])
    def test_a_graph_makes_new_views_at_each_replay(self, machine: Machine, size: int) -> None:
        ours = machine.views(EVERYTHING, size, normalization=ZSCORE, dtype=torch.bfloat16, channels_last=True)
        images = random_images(8, size).to(machine.device)
        eager, captured = stream(machine), stream(machine)
        expected = [ours.pair(images, eager) for _ in range(5)]
        replay = machine.capture(lambda: ours.pair(images, captured))
        for number in range(1, 4):  # the first was made to warm up
            assert torch.equal(replay(), expected[number])
        captured.set_state(torch.tensor([SEED, 0]))
        assert torch.equal(replay(), expected[0])
        images.copy_(images.flip(0))
        assert not torch.equal(replay(), expected[1])

    def test_generators_of_torch_draw_whole_batches_as_without_the_kernel(self, machine: Machine) -> None:
        images = random_images(20, 16).to(machine.device)
        ours = machine.views(ALL, 16, normalization=PLAIN)
        without = Views(ALL, 16, tuple(part.to(machine.device) for part in PLAIN))
        without._kernel = None
        source, other = (torch.Generator(machine.device).manual_seed(4) for _ in range(2))
        before = machine.launcher.launches
        for _ in range(2):
            assert torch.equal(ours.pair(images, source), without.pair(images, other))
        assert machine.launcher.launches == before
        with pytest.raises(ValueError, match="have no kernel for a Philox"):
            without.pair(images, stream(machine))

    @pytest.mark.parametrize("size", [8, 32, 48, 64, 96, 112, 224, 512])
    @pytest.mark.parametrize("blurs", [False, True])
    @pytest.mark.parametrize("shared", [100_000, host.SHARED_PER_BLOCK])
    def test_shapes_of_launches(
        self, monkeypatch: pytest.MonkeyPatch, size: int, blurs: bool, shared: int
    ) -> None:
        seen = []

        class Launcher:
            shared_bytes, processors = shared, 132

            def launch(self, arguments: Arguments, tensors: dict[str, Tensor], *shape: int) -> None:
                seen.append((arguments, tensors, shape))

        monkeypatch.setattr(views, "KERNEL_ON", ("cpu",))
        monkeypatch.setattr(cuda_views, "load", lambda _: Launcher())
        config = replace_probability(ViewsConfig(), blur_probability=0.5 if blurs else 0.0)
        ours, source = Views(config, size, ZSCORE), Philox(1, torch.device("cpu"))
        images = torch.zeros(512, 3, 1, 1, dtype=torch.uint8).expand(512, 3, size, size)
        monkeypatch.setattr(Tensor, "contiguous", lambda self: self)
        out = ours.pair(images, source)
        ((arguments, tensors, (blocks, threads, dynamic)),) = seen
        assert (arguments.image_count, arguments.views, arguments.firsts) == (512, 1024, 512)
        assert arguments.size == size
        assert arguments.blur_half == (kernel_size(size) // 2 if blurs else 0)
        assert tensors["out"] is out
        assert tensors["at"] is source.at
        assert tensors["images"] is images
        assert not tensors.keys() & {"given", "record"}
        assert threads in (256, 512, 1024)
        values = (4 if blurs else 3) * size * size
        if 4 * values <= shared:
            assert (blocks, dynamic) == (1024, 4 * values)
            assert "scratch" not in tensors
        else:
            assert dynamic == 0
            assert 132 <= blocks <= 1024
            assert tensors["scratch"].shape == (blocks, values)
            assert tensors["scratch"].numel() <= cuda_views.SCRATCH_VALUES
        for column, name in enumerate(("scale", "shift")):
            expected = ((1 / ZSCORE[1]), (-ZSCORE[0] / ZSCORE[1]))[column]
            assert torch.equal(tensors[name], expected)
            assert tensors[name].dtype == torch.float32

    def test_what_a_driver_is_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of 100 views with blur: a block each, and its pixels in shared memory."""
        machine = host.install(monkeypatch)
        machine.views(EVERYTHING, 64, normalization=PLAIN).pair(random_images(50, 64), stream(machine))
        assert host.launched(host.loaded_library())[1:] == (100, 512, 4 * 4 * 64 * 64)
        machine.views(EVERYTHING, 160, normalization=PLAIN).pair(random_images(6, 160), stream(machine))
        assert host.launched(host.loaded_library())[1:] == (4, 1024, 0)

    def test_fake_tensors_need_no_driver(self, monkeypatch: pytest.MonkeyPatch) -> None:
        launches = []

        class Launcher:
            shared_bytes, processors = host.SHARED_PER_BLOCK, 132

            def launch(self, *args: object) -> None:
                launches.append(args)

        monkeypatch.setattr(cuda_views, "load", lambda _: Launcher())
        device = torch.device("cuda", 0)
        with FakeTensorMode():
            normalization = torch.zeros(3, device=device), torch.ones(3, device=device)
            ours = Views(EVERYTHING, 160, normalization, dtype=torch.bfloat16, channels_last=True)
            source = ours.stream(1, "views")
            images = torch.empty(6, 3, 160, 160, dtype=torch.uint8, device=device)
            with Operations() as operations:
                made = ours.pair(images, source)
        assert ours.stream_kind == "cuda-philox"
        assert (made.shape, made.dtype, made.device) == ((12, 3, 160, 160), torch.bfloat16, device)
        assert made.is_contiguous(memory_format=torch.channels_last)
        assert len(launches) == 1
        assert operations.names == ["add_"]

    def test_a_thread_that_never_used_the_device_gets_its_context(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        machine = host.install(monkeypatch)
        ours, made = machine.views(ALL, 8, normalization=PLAIN), []
        images = random_images(6, 8)
        thread = threading.Thread(target=lambda: made.append(ours.pair(images, stream(machine))))
        thread.start()
        thread.join()
        assert torch.equal(made[0], ours.pair(images, stream(machine)))

    def test_a_launch_goes_to_the_current_stream_of_the_kernels_device(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        machine, entered = host.install(monkeypatch), []
        handles = {torch.device("cpu", 0): 0x7F00_0000_1234}

        def on_device(device: torch.device) -> AbstractContextManager[None]:
            entered.append(device)
            return nullcontext()

        monkeypatch.setattr(cuda_driver, "on_device", on_device)
        monkeypatch.setattr(cuda_driver, "current_stream", handles.__getitem__)
        drawn(machine.views(ALL, 8, normalization=PLAIN), stream(machine), 4)
        assert entered == [torch.device("cpu", 0)]
        assert host.loaded_library().host_stream() == 0x7F00_0000_1234

    def test_what_the_driver_refuses_is_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        machine = host.install(monkeypatch)
        with pytest.raises(RuntimeError, match=r"CUDA error: refused \(1\)"):
            machine.launcher.launch(Arguments(), {}, 1, 4096, 0)


class TestSource:
    def test_arguments_are_those_of_the_source_in_order_and_type(self) -> None:
        (body,) = re.findall(r"struct Arguments \{(.*?)\};", cuda_views.source(), re.DOTALL)
        declared = []
        for line in re.sub(r"//.*", "", body).split(";"):
            if line.strip():
                kind, names = re.fullmatch(r"\s*(.*?)(\w+(?:, \w+)*)", line.strip(), re.DOTALL).groups()
                declared += [(name, kind.strip()) for name in names.split(", ")]
        types = {"int": ctypes.c_int, "float": ctypes.c_float}
        assert [
            (name, ctypes.c_void_p if kind.endswith("*") else types[kind]) for name, kind in declared
        ] == list(Arguments._fields_)
        assert host.loaded_library().host_sizes(0) == ctypes.sizeof(Arguments)

    def test_pointers_lead_to_what_the_source_takes_them_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        machine = host.install(monkeypatch)
        real, seen = machine.launcher.launcher.launch, []

        def launch(arguments: Arguments, tensors: dict[str, Tensor], *shape: int) -> None:
            seen.append({name: tensor.dtype for name, tensor in tensors.items()})
            assert all(tensor.is_contiguous() for name, tensor in tensors.items() if name != "out")
            real(arguments, tensors, *shape)

        monkeypatch.setattr(machine.launcher.launcher, "launch", launch)
        kinds = {"const unsigned char*": torch.uint8, "const long long*": torch.int64}
        kinds |= dict.fromkeys(("const float*", "float*"), torch.float32)
        source = dict(
            reversed(pair) for pair in re.findall(r"(const .*?\*|float\*) (\w+);", cuda_views.source())
        )
        ours = machine.views(EVERYTHING, 160, normalization=ZSCORE)
        table = drawn(ours, stream(machine), 4)
        ours._kernel.apply(random_images(6, 160), table)
        ours.pair(random_images(6, 160), stream(machine))
        told = {name: dtype for tensors in seen for name, dtype in tensors.items()}
        assert told.pop("out") == torch.float32
        assert told == {name: kinds[source[name]] for name in told}
        assert told.keys() | {"out"} == set(cuda_views.POINTERS)

    def test_columns_are_those_of_the_source(self) -> None:
        assert host.loaded_library().host_sizes(1) == COLUMNS

    def test_a_table_has_each_views_parameters_in_its_row(self) -> None:
        draws = Views(EVERYTHING, 32, PLAIN).draw(96, generator(1))
        table = draws.table()
        for row, view in enumerate(draws.view.tolist()):
            got = table[view]
            assert torch.equal(got[BOX], draws.box[row])
            assert torch.equal(got[FACTORS], draws.factors[row])
            order = draws.order[row].tolist()
            order.insert(row % 4, 3)
            assert got[ORDER].tolist() == order
            for column, name in (
                (FLIP, "flip"), (HUE, "hue"), (GRAYSCALE, "grayscale"), (BLUR, "blur"), (SIGMA_AT, "sigma"),
                (SOLARIZE, "solarize"),
            ):  # fmt: skip
                assert got[column] == getattr(draws, name)[row]

    @pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
    def test_nvrtc_compiles_it(self, architecture: str) -> None:
        try:
            cuda_driver.nvrtc()
        except OSError as error:
            pytest.skip(str(error))
        code = cuda_driver.compile_source(cuda_views.source(), architecture, cuda_views.definitions())
        assert code.startswith(b"\x7fELF")
        assert b"make_views" in code

    def test_nvrtc_says_what_is_wrong(self) -> None:
        try:
            cuda_driver.nvrtc()
        except OSError as error:
            pytest.skip(str(error))
        with pytest.raises(
            RuntimeError, match=r'kernel.cu\(\d+\): error: identifier "ATTEMPTS" is undefined'
        ):
            cuda_driver.compile_source(cuda_views.source(), "sm_90", {})


@pytest.fixture
def kernel_of_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Views on the CPU look for the kernel as they do on CUDA; nothing of it is there."""
    monkeypatch.setattr(views, "KERNEL_ON", ("cpu",))
    cuda_views._loaded.cache_clear()
    cuda_views.supported.cache_clear()
    yield
    cuda_views._loaded.cache_clear()
    cuda_views.supported.cache_clear()


@pytest.mark.usefixtures("kernel_of_cpu")
class TestFallback:
    @pytest.mark.parametrize(
        "error",
        [
            OSError("libcuda.so.1: cannot open"),
            AttributeError("no cuLaunchKernel"),
            RuntimeError("NVRTC: kernel.cu(3): error\nmore"),
        ],
    )
    def test_without_a_kernel_views_are_made_by_whole_batches(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
    ) -> None:
        def fail() -> None:
            raise error

        monkeypatch.setattr(cuda_driver, "driver", fail)
        images, normalization = random_images(8, 16), ZSCORE
        for _ in range(2):
            ours = Views(ALL, 16, normalization)
            assert ours.stream_kind == "cpu"
            source = ours.stream(1, "views", 2)
            assert isinstance(source, torch.Generator)
            assert source.initial_seed() == derive_seed(1, "views", 2)
            assert ours.pair(images, source).shape == (16, 3, 16, 16)
        (record,) = caplog.records
        reason = str(error).splitlines()[0]
        assert (
            record.getMessage()
            == f"views on cpu:0 are made without the fused kernel, which is slower: {reason}"
        )
        assert record.levelname == "WARNING"

    def test_images_that_are_too_large_are_said_once(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        machine = host.install(monkeypatch)
        for _ in range(2):
            assert Views(ALL, 1280, PLAIN).stream_kind == "cpu"
        assert [record.getMessage() for record in caplog.records] == [
            "views of 1280 pixels are made without the fused kernel, which is slower"
        ]
        assert machine.views(ALL, 1279, normalization=PLAIN).stream_kind == "cuda-philox"
        assert machine.views(ViewsConfig(), 1280, normalization=PLAIN).stream_kind == "cuda-philox"

    def test_other_dtypes_are_made_by_whole_batches(self, monkeypatch: pytest.MonkeyPatch) -> None:
        host.install(monkeypatch)
        assert Views(ALL, 16, PLAIN, dtype=torch.float16).stream_kind == "cpu"

    def test_preparing_compiles(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = []
        monkeypatch.setattr(cuda_views, "load", asked.append)
        monkeypatch.setattr(views, "KERNEL_ON", ("cuda",))
        views.prepare(torch.device("cuda", 1))
        assert asked == [torch.device("cuda", 1)]


def test_on_cpus_streams_are_torchs_generators() -> None:
    ours = Views(ALL, 16, PLAIN)
    assert ours.stream_kind == "cpu"
    source = ours.stream(1, "views", 2)
    assert isinstance(source, torch.Generator)
    expected = torch.Generator().manual_seed(derive_seed(1, "views", 2))
    assert torch.equal(ours.draw(8, source).box, ours.draw(8, expected).box)
    assert torch.rand(1, generator=source).equal(torch.rand(1, generator=expected))
