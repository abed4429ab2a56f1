"""The ops that a library runs on CUDA, and those that launch no kernel: data, no logic.

An op that is not named here is judged by Inductor's own registries; see `policy`.
"""

from __future__ import annotations

from triton_only_backend.audit.vocabulary import Provider, Reason

_GEMM_REMEDY = (
    'use bf16, fp16 or fp32 operands, or mode="max-autotune" for Inductor\'s Triton GEMM templates'
)
_ATTENTION_REMEDY = (
    "call F.scaled_dot_product_attention with bf16, fp16 or fp32 and arguments our kernel takes"
)
_CONV_REMEDY = 'mode="max-autotune" uses Inductor\'s Triton convolution'
_CONV_BACKWARD_REMEDY = (
    'mode="max-autotune" with options={"max_autotune_conv_bwd_weight_backends": "TRITON", '
    '"max_autotune_conv_bwd_input_backends": "TRITON"}, where this torch has them'
)
_NORM_REMEDY = "use F.batch_norm under torch.compile, which Inductor decomposes into Triton"
_MASK_REMEDY = "use torch.where and a mask of fixed shape"
_SEED_REMEDY = (
    'allow=["prims.inductor_seed*"]: one small launch a graph seeds Triton\'s random numbers'
)

_CONTROL = "cond while_loop while_loop_stack_output invoke_subgraph scan map_impl map invoke_quant "
_CONTROL += "wrap wrap_with_set_grad_enabled wrap_with_autocast wrap_activation_checkpoint "
_CONTROL += "tag_activation_checkpoint hints_wrapper strict_mode autograd_function_apply print "
_CONTROL += "with_effects auto_functionalized auto_functionalized_v2 control_deps out_dtype "
_CONTROL += "run_and_save_rng_state run_with_rng_state graphsafe_run_with_rng_state "
_CONTROL += "run_dtensor_rng_op invoke_quant_packed"

_MEMORY = "empty empty_like empty_strided empty_permuted empty_quantized new_empty "
_MEMORY += "new_empty_strided resize_ resize_as_ set_ as_strided_ record_stream lift lift_fresh "
_MEMORY += "sym_size sym_stride sym_numel sym_storage_offset size stride numel storage_offset "
_MEMORY += "is_same_size is_contiguous is_nonzero is_pinned _assert_async _assert_scalar "
_MEMORY += "_assert_tensor_metadata _functional_assert_async _functional_assert_scalar "
_MEMORY += "sym_constrain_range sym_constrain_range_for_size resolve_conj resolve_neg reshape "
_MEMORY += "detach detach_ _unsafe_view view_as_complex view_as_real flatten expand_as view_as "
_MEMORY += "result_type _version is_complex is_floating_point requires_grad_ _reshape_alias "
_MEMORY += "_has_compatible_shallow_copy_type _nested_tensor_size unsafe_split unsafe_chunk "
_MEMORY += "retain_grad output_nr is_leaf data set_data meshgrid atleast_1d atleast_2d atleast_3d"

# (provider, reason, remedy, ops); * matches any characters. The first row that names an op wins.
ROWS: tuple[tuple[Provider, Reason | None, str, str], ...] = (
    (
        Provider.CUBLAS,
        Reason.LIBRARY_ONLY,
        _GEMM_REMEDY,
        "aten.mm aten.addmm aten.bmm aten.baddbmm aten.addbmm aten.matmul aten.linear aten.mv "
        "aten.addmv aten.dot aten.vdot aten._addmm_activation aten._int_mm aten._scaled_mm* "
        "aten.mm_dtype aten.bmm_dtype aten.linear_backward aten.matmul_backward aten.chain_matmul "
        "aten.inner aten.tensordot aten.einsum aten.bilinear aten._trilinear aten.bias_addmm "
        "aten.mm_plus_mm aten._mm_plus_mm inductor._mm_plus_mm aten.conv1x1_via_mm "
        "aten._dyn_quant_matmul_4bit",
    ),
    (
        Provider.CUTLASS,
        Reason.LIBRARY_ONLY,
        _GEMM_REMEDY,
        "aten._grouped_mm aten._scaled_grouped_mm* aten._sparse_semi_structured*",
    ),
    (
        Provider.ATEN,
        Reason.LIBRARY_ONLY,
        "dequantise the weight in the model, so that the product becomes an mm",
        "aten._weight_int4pack_mm* aten._weight_int8pack_mm* aten._convert_weight_to_int4pack*",
    ),
    (
        Provider.CUDNN,
        Reason.LIBRARY_ONLY,
        _CONV_REMEDY,
        "aten.convolution aten._convolution aten.conv1d aten.conv2d aten.conv3d "
        "aten.conv_transpose* aten.convolution_overrideable aten.cudnn_convolution* "
        "aten.miopen_convolution* aten._conv_depthwise2d aten.conv_depthwise3d",
    ),
    (
        Provider.CUDNN,
        Reason.LIBRARY_ONLY,
        _CONV_BACKWARD_REMEDY,
        "aten.convolution_backward aten.convolution_backward_overrideable aten.call_aten_dw "
        "aten.call_aten_dx",
    ),
    (
        Provider.CUDNN,
        Reason.LIBRARY_ONLY,
        _ATTENTION_REMEDY,
        "aten._scaled_dot_product_cudnn_attention* aten._cudnn_attention*",
    ),
    (
        Provider.EFFICIENT,
        Reason.LIBRARY_ONLY,
        _ATTENTION_REMEDY,
        "aten._scaled_dot_product_efficient_attention* aten._efficient_attention*",
    ),
    (
        Provider.FLASH,
        Reason.LIBRARY_ONLY,
        _ATTENTION_REMEDY,
        "aten._scaled_dot_product_* aten._flash_attention* aten.scaled_dot_product_attention "
        "aten._fused_sdp_choice aten._triton_scaled_dot_attention "
        "aten._triton_multi_head_attention aten._native_multi_head_attention "
        "aten._transformer_encoder_layer_fwd",
    ),
    (
        Provider.CUDNN,
        Reason.LIBRARY_ONLY,
        "unroll the recurrence in Python, so that its products become mm",
        "aten._cudnn_rnn* aten.miopen_rnn* aten.lstm aten.gru aten.rnn_tanh aten.rnn_relu",
    ),
    (
        Provider.CUDNN,
        Reason.LIBRARY_ONLY,
        _NORM_REMEDY,
        "aten.cudnn_batch_norm* aten.miopen_batch_norm* aten._batch_norm_impl_index*",
    ),
    (
        Provider.CUDNN,
        Reason.LIBRARY_ONLY,
        "",
        "aten.cudnn_* aten._cudnn_* aten.miopen_* aten._miopen_*",
    ),
    (
        Provider.CUSOLVER,
        Reason.NO_TRITON_LOWERING,
        "",
        "aten.linalg_* aten._linalg_* aten.cholesky* aten._cholesky* aten.geqrf aten.ormqr "
        "aten.orgqr aten.lu_unpack aten.lu_solve aten._lu_with_info aten.triangular_solve "
        "aten.inverse aten.det aten.slogdet aten.logdet aten.svd aten._svd* aten.qr "
        "aten.pinverse aten.matrix_exp",
    ),
    (Provider.CUFFT, Reason.NO_TRITON_LOWERING, "", "aten._fft_* aten.fft_* aten.stft aten.istft"),
    (
        Provider.CUSPARSE,
        Reason.NO_TRITON_LOWERING,
        "use dense tensors",
        "aten._sparse_* aten.sparse_* aten._to_sparse* aten.to_sparse* "
        "aten._sparse_mm* aten.sspaddmm",
    ),
    (
        Provider.CUB,
        Reason.DATA_DEPENDENT,
        _MASK_REMEDY,
        "aten.nonzero aten.nonzero_numpy aten.nonzero_static aten.argwhere aten.masked_select "
        "aten.unique_dim aten.unique_consecutive aten.unique_dim_consecutive aten._unique "
        "aten._unique2",
    ),
    (
        Provider.CUB,
        Reason.NO_TRITON_LOWERING,
        "",
        "aten.sort aten.argsort aten.msort aten.randperm aten.mode",
    ),
    (Provider.ATEN, Reason.DATA_DEPENDENT, "", "aten.bincount aten.repeat_interleave"),
    (
        Provider.ATEN,
        Reason.NO_TRITON_LOWERING,
        "",
        "aten.topk aten.kthvalue aten.median aten.nanmedian aten.multinomial aten.histc "
        "aten.histogram aten._histogramdd_* aten._embedding_bag* aten._ctc_loss* aten._cdist* "
        "aten._pdist* aten.segment_reduce aten._segment_reduce_backward aten.masked_scatter",
    ),
    (
        Provider.ATEN,
        Reason.LIBRARY_ONLY,
        _SEED_REMEDY,
        "prims.inductor_seed prims.inductor_seeds",
    ),
    (Provider.MEMCPY, None, "", "prims.device_put aten._local_scalar_dense aten.item fsdp.copy_"),
    (
        Provider.NONE,
        None,
        "",
        "prims._make_token prims._sink_tokens streams.* profiler.* inductor.resize_storage_bytes_ "
        "inductor._alloc_from_pool inductor._reinterpret_tensor _c10d_functional.wait_tensor "
        "c10d_functional.wait_tensor _c10d_functional_autograd.wait_tensor "
        "prims.inductor_force_stride_order debugprims.*",
    ),
    (Provider.CUBLAS, Reason.LIBRARY_ONLY, "", "symm_mem.*mm* symm_mem.*matmul*"),
    (
        Provider.NCCL,
        None,
        "",
        "_c10d_functional.* c10d_functional.* _c10d_functional_autograd.* c10d.* _dtensor.* "
        "symm_mem.*",
    ),
    (
        Provider.CPU,
        Reason.CPU_KERNEL,
        "move the model and its inputs to the GPU",
        "mkldnn.* onednn.* mkl.* quantized.* _quantized.*",
    ),
    (
        Provider.TRITON_USER,
        None,
        "",
        "higher_order.triton_kernel_wrapper_functional higher_order.triton_kernel_wrapper_mutation",
    ),
    (
        Provider.TRITON_INDUCTOR,
        None,
        "",
        "higher_order.flex_attention higher_order.flex_attention_backward "
        "higher_order.associative_scan higher_order.inline_asm_elementwise "
        "higher_order.foreach_map",
    ),
    (Provider.NONE, None, "", " ".join(f"higher_order.{name}" for name in _CONTROL.split())),
    (Provider.NONE, None, "", " ".join(f"aten.{name}" for name in _MEMORY.split())),
)
