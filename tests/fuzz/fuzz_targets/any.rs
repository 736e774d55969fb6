//! Every parser of the project under libFuzzer: FEALTY_FUZZ names the one to run, as ROOM/NAME.

#![no_main]

use std::sync::LazyLock;

type Target = fn(&[u8]);

const TARGETS: &[(&str, Target)] = &[
    ("attest/attest", fealty_attest::fuzz::attest),
    ("attest/bundle", fealty_attest::fuzz::bundle),
    ("attest/certificate", fealty_attest::fuzz::certificate),
    ("attest/dns_answer", fealty_attest::fuzz::dns_answer),
    ("attest/evidence", fealty_attest::fuzz::evidence),
    ("attest/firmware_log", fealty_attest::fuzz::firmware_log),
    ("attest/ima_log", fealty_attest::fuzz::ima_log),
    ("attest/layer_log", fealty_attest::fuzz::layer_log),
    ("attest/note", fealty_attest::fuzz::note),
    ("attest/public", fealty_attest::fuzz::public),
    ("attest/service_answer", fealty_attest::fuzz::service_answer),
    ("attest/signature", fealty_attest::fuzz::signature),
    ("attest/stream", fealty_attest::fuzz::stream),
    ("attest/vm_file", fealty_attest::fuzz::vm_file),
    ("attest/vm_request", fealty_attest::fuzz::vm_request),
    ("attest-tpm/certificate", fealty_attest_tpm::fuzz::certificate),
    ("attest-tpm/credential", fealty_attest_tpm::fuzz::credential),
    ("attest-tpm/tcti", fealty_attest_tpm::fuzz::tcti),
    ("blockcrypt/inspect", fealty_blockcrypt::fuzz::fuzz_inspect),
    ("blockcrypt/log_block", fealty_blockcrypt::fuzz::fuzz_log_block),
    ("blockcrypt/page", fealty_blockcrypt::fuzz::fuzz_page),
    ("blockcrypt/superblock", fealty_blockcrypt::fuzz::fuzz_superblock),
    ("cedar/rules", fealty_policy_cedar::fuzz::fuzz_rules),
    ("disk/nbd_handshake", fealty_disk::fuzz::fuzz_nbd_handshake),
    ("disk/nbd_requests", fealty_disk::fuzz::fuzz_nbd_requests),
    ("disk/vhost_user", |data| drop(fealty_disk::fuzz::fuzz_vhost_user(data))),
    ("disk/virtio_queue", fealty_disk::fuzz::fuzz_virtio_queue),
    ("host/frames", fealty_host::fuzz::frames),
    ("host/layer_arg", fealty_host::fuzz::layer_arg),
    ("host/state", fealty_host::fuzz::state),
    ("keyprovider/bodies", fealty_keyprovider::fuzz::fuzz_bodies),
    ("keyprovider/certificate", fealty_keyprovider::fuzz::fuzz_certificate),
    ("keyprovider/tool", fealty_keyprovider::fuzz::fuzz_tool),
    ("netcrypt/open", fealty_netcrypt::fuzz::fuzz_open),
    ("vmm/balloon", fealty_vmm::machine::fuzz::fuzz_balloon),
    ("vmm/block", fealty_vmm::machine::fuzz::fuzz_requests),
    ("vmm/bus", fealty_vmm::machine::fuzz::fuzz_bus),
    ("vmm/console", fealty_vmm::machine::fuzz::fuzz_console),
    ("vmm/http", fealty_vmm::fuzz::fuzz_http),
    ("vmm/kernel", fealty_vmm::machine::fuzz::fuzz_kernel),
    ("vmm/keys", fealty_vmm::fuzz::fuzz_keys),
    ("vmm/pci", fealty_vmm::machine::fuzz::fuzz_pci),
    ("vmm/net", fealty_vmm::machine::fuzz::fuzz_net),
    ("vmm/plain", fealty_vmm::fuzz::fuzz_plain),
    ("vmm/rng", fealty_vmm::machine::fuzz::fuzz_rng),
    ("vmm/vsock", fealty_vmm::machine::fuzz::fuzz_vsock),
];

static CHOSEN: LazyLock<Target> = LazyLock::new(|| {
    let name = std::env::var("FEALTY_FUZZ").unwrap_or_default();
    let found = TARGETS.iter().find(|(known, _)| *known == name);
    found.map(|(_, target)| *target).unwrap_or_else(|| {
        let known: Vec<&str> = TARGETS.iter().map(|(name, _)| *name).collect();
        panic!("FEALTY_FUZZ names a parser, one of: {}", known.join(", "))
    })
});

libfuzzer_sys::fuzz_target!(|data: &[u8]| { (*CHOSEN)(data) });
