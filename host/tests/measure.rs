//! `fealty-host measure`, `status` and `identity`, as an operator uses them.
mod common;

use attest::eventlog::LayerLog;
use common::Host;
use policy::Digest;
use std::fs;

#[test]
fn layers_are_measured_in_order_sealed_and_shown() {
    let host = Host::booted();
    let _service = host.serve(&[]);
    let ended = host.run(&["measure", "--json", "fealty=fealty@1.0", "fealty-host=fealty-host"]).good();
    let lines: Vec<serde_json::Value> = ended.out.lines().map(|l| serde_json::from_str(l).expect("JSON")).collect();
    assert_eq!(lines.len(), 2);
    assert_eq!(lines[0]["layer"], "fealty");
    assert_eq!(lines[0]["version"], "1.0");
    assert_eq!(lines[0]["digest"], Digest::of(b"fealty").to_string());
    let log = LayerLog::parse(&fs::read(host.path("run/layers.log")).expect("a log")).expect("a good log");
    assert!(log.is_sealed());
    let names: Vec<&str> = log.layers().iter().map(|l| l.name.as_str()).collect();
    assert_eq!(names, ["fealty", "fealty-host"]);

    let more = host.run(&["measure", "more=more@2"]).good();
    assert!(more.out.contains(&Digest::of(b"more").to_string()) && more.out.contains("sealed"), "{}", more.out);
    let status: serde_json::Value = serde_json::from_str(&host.run(&["status", "--json"]).good().out).expect("JSON");
    assert_eq!(status["layers"], serde_json::json!(["fealty 1.0", "fealty-host", "more 2"]));
    assert_eq!(status["sealed"], true);
    let shown = host.run(&["status"]).good().out;
    assert!(shown.contains("3 (sealed)") && shown.contains("fealty 1.0"), "{shown}");
}

#[test]
fn each_layer_once_a_boot_and_all_or_none() {
    let host = Host::booted();
    let _service = host.ready();
    let mut vm = host.vm("acme", "payroll");
    let before = fs::read(host.path("run/layers.log")).expect("a log");
    let again = host.run(&["measure", "fealty=more"]).refused();
    assert!(again.err.contains("measured already"), "{}", again.err);
    // Told by the service too, and no harm to the VMs of the host.
    let (reason, _) = common::refused(host.control().extend("fealty", "", Digest::of(b"more")));
    assert!(reason.contains("measured already"), "{reason}");
    let late = host.run(&["measure", "more=more", "fealty=fealty"]).refused();
    assert!(late.err.contains("measured already"), "{}", late.err);
    let missing = host.run(&["measure", "more=more", "x=missing"]).refused();
    assert!(missing.err.contains("missing") && missing.err.trim().lines().count() == 1, "{}", missing.err);
    let twice = host.run(&["measure", "more=more", "more=more"]).refused();
    assert!(twice.err.contains("twice"), "{}", twice.err);
    let folder = host.run(&["measure", "more=."]).refused();
    assert!(folder.err.contains("regular file"), "{}", folder.err);
    assert_eq!(host.run(&["measure", "=x"]).code, Some(2));
    assert_eq!(fs::read(host.path("run/layers.log")).expect("a log"), before);
    let quoted = vm.client.quote(&common::quote(1, &[0, 14], None)).expect("a quote");
    common::verify(&host, &mut vm, 1, &[0, 14], &quoted);
}

#[test]
fn a_log_that_was_left_unsealed_is_sealed_without_a_new_layer() {
    let host = Host::booted();
    let _service = host.serve(&[]);
    let none = host.run(&["measure"]).refused();
    assert!(none.err.contains("no layer was measured"), "{}", none.err);
    host.measure();
    let mut vm = host.vm("acme", "payroll");
    // Somebody who measured ended before the seal.
    host.control().extend("more", "1", Digest::of(b"more")).expect("measured");
    let again = host.run(&["measure", "more=more"]).refused();
    assert!(again.err.contains("fealty-host measure without layers seals"), "{}", again.err);
    common::refused(vm.client.quote(&common::quote(1, &[0, 14], None)));
    let sealed = host.run(&["measure"]).good();
    assert!(sealed.out.contains("layer log sealed"), "{}", sealed.out);
    let quoted = vm.client.quote(&common::quote(2, &[0, 14], None)).expect("a quote");
    common::verify(&host, &mut vm, 2, &[0, 14], &quoted);
}

#[test]
fn measuring_starts_a_service_that_remembers_the_logs() {
    let host = Host::booted();
    host.measure();
    // The next one is told no paths, and knows them.
    let words = ["identity", "--certificate", "ek.der", "--public", "ek.pub", "--json"];
    let identity: serde_json::Value = serde_json::from_str(&host.run(&words).good().out).expect("JSON");
    assert_eq!(fs::read(host.path("ek.der")).ok(), fs::read(host.tpm.ek_certificate()).ok());
    let public = attest::tpm::Public::parse(&fs::read(host.path("ek.pub")).expect("written")).expect("a public area");
    assert_eq!(identity["host"], public.host_id().to_string());
    assert_eq!(identity["ek_kind"], "p-384");
    let mut vm = host.vm("acme", "payroll");
    let pcrs = [0, 7, 10, 14];
    let quoted = vm.client.quote(&common::quote(1, &pcrs, Some(0))).expect("a quote");
    assert_eq!(quoted.firmware_log.0, fs::read(host.path("firmware.log")).expect("a log"));
    common::verify(&host, &mut vm, 1, &pcrs, &quoted);
}
