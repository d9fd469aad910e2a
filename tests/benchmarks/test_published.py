import torch

from genossm.benchmarks.published import PublishedHyenaDNA, long_convolution
from genossm.models.hyenadna import HyenaDNAConfig
from genossm.ops.fftconv import fftconv_ref


def test_published_form_of_the_convolution_is_the_same_function():
    x, k, skip = (torch.randn(*shape, dtype=torch.float64) for shape in ((2, 3, 17), (3, 17), (3,)))
    truth = fftconv_ref(x.transpose(1, 2), k, skip).transpose(1, 2)
    torch.testing.assert_close(long_convolution(x, k, skip), truth)


def test_published_order_of_operations_gives_our_logits():
    model = HyenaDNAConfig(d_model=16, n_layer=2, max_length=50).build().eval()
    ids = torch.randint(7, 11, (2, 37))
    torch.testing.assert_close(PublishedHyenaDNA(model)(ids), model.logits(model(ids)), atol=1e-5, rtol=1e-5)
