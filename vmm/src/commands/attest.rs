//! `fealty attest --dry-run`: this host's evidence for a human, and what the VM's key provider thinks of it. Nothing is
//! released and nothing is started: the provider is asked for its opinion only.

use crate::exit::{Exit, Failure, chain, one_line};
use crate::provider::{contacts, failure};
use crate::registrar::Registrar;
use crate::run::{Host, read_vm_file};
use crate::sandbox::{Filter, close_inherited, close_thread, harden, process};
use crate::steps::Steps;
use attest::eventlog::{firmware, layer::LayerLog};
use attest::flow::{Examined, Step};
use attest::protocol::{Evidence, Opinion};
use policy::Operation;
use policy::operation::OperationRequest;
use serde_json::{Value, json};
use std::io::Write;
use std::path::Path;

/// Gathers this host's evidence for the VM of `file`, shows it, and asks the provider.
pub fn run(file: &Path, host: &Host, steps: Steps) -> Result<Exit, Failure> {
    process::settle();
    close_inherited().map_err(|e| Failure::of(Exit::Host, &e))?;
    let file = read_vm_file(file)?;
    let (sender, registered) = std::sync::mpsc::channel();
    let mut registrar = Registrar::start(&file, host)?;
    let contacts = contacts(&file, host, registered, steps)?;
    let _ = sender.send((registrar.registered()?, registrar));
    let mut attester = (contacts.attester)()?;
    harden().and_then(|()| close_thread(Filter::Provider)).map_err(|e| Failure::of(Exit::Host, &e))?;
    let examined = attester
        .examine(&OperationRequest::plain(Operation::PowerOn), &mut |s: Step| steps.timed(s.name, &s.detail, s.took))
        .map_err(|e| failure(&e))?;
    let described = describe(&examined);
    let good = examined.opinion.would_release;
    let thought = thought(&examined.opinion);
    let text = if steps.json() {
        json!({ "evidence": described, "would_release": good, "provider": thought }).to_string()
    } else {
        format!("{}provider        {}: {thought}", for_people(&described), if good { "accepts" } else { "refuses" })
    };
    // Whoever closed standard output does not want it.
    let _ = std::io::stdout().write_all((text + "\n").as_bytes());
    Ok(if good { Exit::Done } else { Exit::Refused })
}

fn thought(opinion: &Opinion) -> String {
    match &opinion.problem {
        Some(problem) => {
            let detail = problem.detail.as_deref().map(|d| format!(" ({d})")).unwrap_or_default();
            one_line(&format!("{}{detail}", problem.title))
        }
        None if opinion.would_release => "this host would get the VM's keys".into(),
        None => "it does not say why".into(),
    }
}

/// The evidence, as far as a human can use it.
fn describe(examined: &Examined) -> Value {
    let Examined { challenge, evidence, qualified, .. } = examined;
    let pcrs: Vec<_> =
        challenge.pcrs.iter().zip(&evidence.pcr_values).map(|(n, v)| json!({ "pcr": n, "value": v })).collect();
    json!({
        "host": challenge.host,
        "vm_file": evidence.vm_file,
        "ak_known": challenge.credential.is_none(),
        "pcrs": pcrs,
        "qualified": qualified,
        "earlier_peer": evidence.earlier_peer,
        "claims": serde_json::from_slice::<Value>(&evidence.claims).unwrap_or_default(),
        "firmware": firmware_facts(evidence),
        "layers": layer_facts(evidence),
        "ima_bytes": evidence.ima_log.len(),
        "quote_bytes": evidence.quote.len(),
    })
}

fn firmware_facts(evidence: &Evidence) -> Value {
    match firmware::replay(&evidence.firmware_log) {
        Ok(replay) => json!({ "bytes": evidence.firmware_log.len(), "measurements": replay.measurements.len() }),
        Err(error) => json!({ "bytes": evidence.firmware_log.len(), "unreadable": chain(&error) }),
    }
}

fn layer_facts(evidence: &Evidence) -> Value {
    match LayerLog::parse(&evidence.layer_log) {
        Ok(log) => {
            let layers: Vec<_> = log
                .layers()
                .iter()
                .map(|l| json!({ "layer": l.name, "version": l.version, "sha256": l.digest }))
                .collect();
            json!({ "layers": layers, "sealed": log.is_sealed(), "shell": log.has_shell() })
        }
        Err(error) => json!({ "unreadable": chain(&error) }),
    }
}

fn for_people(evidence: &Value) -> String {
    let text = |value: &Value| one_line(&value.as_str().map_or_else(|| value.to_string(), str::to_owned));
    let mut lines = vec![
        format!("host            {}", text(&evidence["host"])),
        format!("VM file         {}", text(&evidence["vm_file"])),
        format!("AK known        {}", text(&evidence["ak_known"])),
        format!("earlier peer    {}", text(&evidence["earlier_peer"])),
        format!("claims          {}", text(&evidence["claims"])),
        format!("firmware log    {}", text(&evidence["firmware"])),
        format!("IMA log         {} bytes", text(&evidence["ima_bytes"])),
    ];
    for pcr in evidence["pcrs"].as_array().into_iter().flatten() {
        lines.push(format!("PCR {:<11} {}", text(&pcr["pcr"]), text(&pcr["value"])));
    }
    let layers = &evidence["layers"];
    for layer in layers["layers"].as_array().into_iter().flatten() {
        let (name, version) = (text(&layer["layer"]), text(&layer["version"]));
        lines.push(format!("layer           {name} {version} {}", text(&layer["sha256"])));
    }
    if layers["layers"].is_null() {
        lines.push(format!("layer log       {}", text(layers)));
    }
    lines.push(format!("layers sealed   {}", text(&layers["sealed"])));
    lines.join("\n") + "\n"
}
