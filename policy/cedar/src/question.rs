//! A question to the policy, and how it looks to the engine.

use crate::rules::one_line;
use cedar_policy::{
    Context, Entities, Entity, EntityId, EntityTypeName, EntityUid, Request, RestrictedExpression, Schema,
};
use policy::disk::VolumeOperation;
use policy::document::KeyMemory;
use policy::{CloudId, CustomerId, HostId, InstanceNumber, Operation, VmId};
use std::collections::{BTreeMap, HashSet};
use std::str::FromStr;

/// Whether a host may do an operation with a VM, now. Everything here is verified or the provider's own, but `key_memory`,
/// `ptrace_scope` (the VM process's claims) and `parameters` (the asker's).
#[derive(Clone, Debug)]
pub struct Question<'a> {
    /// The attested host.
    pub host: HostId,
    /// Whether its TPM is a laboratory's.
    pub lab: bool,
    /// The cloud whose inventory holds it.
    pub cloud: CloudId,
    /// Whose VM.
    pub customer: CustomerId,
    /// Which VM.
    pub vm: VmId,
    /// What is asked for.
    pub operation: Operation,
    /// The running instance that asks; none for a power-on.
    pub instance: Option<InstanceNumber>,
    /// Seconds since 1970 UTC by the provider's clock.
    pub time_unix_s: u64,
    /// How the VM process keeps keys.
    pub key_memory: KeyMemory,
    /// `kernel.yama.ptrace_scope`, where the host's kernel has it.
    pub ptrace_scope: Option<u8>,
    /// What the operation was asked with, within the bounds of `policy::operation::OperationRequest::check`.
    pub parameters: &'a BTreeMap<String, String>,
    /// Operations asked for with this VM in the last 3600 seconds, this one not counted.
    pub operations_last_hour: u64,
}

/// Whether an administrator may do an operation with a volume, now. Everything here is the provider's own, but `parameters` (the
/// asker's).
#[derive(Clone, Debug)]
pub struct VolumeQuestion<'a> {
    /// The administrator, by the name that the audit log has.
    pub administrator: &'a str,
    /// Whose volume.
    pub customer: CustomerId,
    /// The volume, by its name.
    pub volume: &'a str,
    /// What is asked for.
    pub operation: VolumeOperation,
    /// Seconds since 1970 UTC by the provider's clock.
    pub time_unix_s: u64,
    /// What the operation was asked with, within the bounds of `policy::disk::VolumeRequest::check`.
    pub parameters: &'a BTreeMap<String, String>,
}

impl VolumeQuestion<'_> {
    /// The request and the entities it speaks of, fitting the schema; or why there is none, in one line.
    pub(crate) fn for_engine(&self, schema: &Schema) -> Result<(Request, Entities), String> {
        let principal = uid("Administrator", self.administrator)?;
        let resource = uid("Volume", self.volume)?;
        let customer = uid("Customer", self.customer.as_str())?;
        let context = context(times(self.time_unix_s)?)?;
        let request = Request::new(principal.clone(), self.action()?, resource.clone(), context, Some(schema))
            .map_err(|e| one_line(&e))?;
        let entities = vec![
            Entity::new_no_attrs(principal, HashSet::new()),
            Entity::new_no_attrs(resource, HashSet::from([customer.clone()])),
            Entity::new_no_attrs(customer, HashSet::new()),
            asked_with(self.parameters)?,
        ];
        Ok((request, Entities::from_entities(entities, Some(schema)).map_err(|e| one_line(&e))?))
    }

    /// The operation as the engine names it.
    pub(crate) fn action(&self) -> Result<EntityUid, String> {
        uid("Action", self.operation.name())
    }
}

impl Question<'_> {
    /// The request and the entities it speaks of, fitting the schema; or why there is none, in one line.
    pub(crate) fn for_engine(&self, schema: &Schema) -> Result<(Request, Entities), String> {
        let request = Request::new(self.principal()?, self.action()?, self.resource()?, self.context()?, Some(schema))
            .map_err(|e| one_line(&e))?;
        let entities = Entities::from_entities(self.entities()?, Some(schema)).map_err(|e| one_line(&e))?;
        Ok((request, entities))
    }

    /// The operation as the engine names it.
    pub(crate) fn action(&self) -> Result<EntityUid, String> {
        uid("Action", self.operation.name())
    }

    fn principal(&self) -> Result<EntityUid, String> {
        uid("Host", &self.host.to_string())
    }

    fn resource(&self) -> Result<EntityUid, String> {
        uid("Vm", self.vm.as_str())
    }

    fn entities(&self) -> Result<Vec<Entity>, String> {
        let cloud = uid("Cloud", self.cloud.as_str())?;
        let customer = uid("Customer", self.customer.as_str())?;
        let lab = ("lab".to_owned(), RestrictedExpression::new_bool(self.lab));
        let host = Entity::new(self.principal()?, [lab].into(), HashSet::from([cloud.clone()]));
        Ok(vec![
            host.map_err(|e| one_line(&e))?,
            asked_with(self.parameters)?,
            Entity::new_no_attrs(self.resource()?, HashSet::from([customer.clone()])),
            Entity::new_no_attrs(cloud, HashSet::new()),
            Entity::new_no_attrs(customer, HashSet::new()),
        ])
    }

    fn context(&self) -> Result<Context, String> {
        let key_memory = match self.key_memory {
            KeyMemory::MemfdSecret => "memfd-secret",
            KeyMemory::Mlock => "mlock",
        };
        let mut pairs = times(self.time_unix_s)?;
        pairs.push(("key_memory", RestrictedExpression::new_string(key_memory.to_owned())));
        pairs.push(("operations_last_hour", long(self.operations_last_hour)?));
        if let Some(instance) = self.instance {
            pairs.push(("instance", long(instance.get())?));
        }
        if let Some(scope) = self.ptrace_scope {
            pairs.push(("ptrace_scope", long(u64::from(scope))?));
        }
        context(pairs)
    }
}

type Pairs = Vec<(&'static str, RestrictedExpression)>;

/// What every question's context has.
fn times(time_unix_s: u64) -> Result<Pairs, String> {
    Ok(vec![
        ("time", long(time_unix_s)?),
        ("hour", long(time_unix_s / 3600 % 24)?),
        ("weekday", long(weekday(time_unix_s))?),
        ("parameters", RestrictedExpression::new_entity_uid(parameters_uid()?)),
    ])
}

fn context(pairs: Pairs) -> Result<Context, String> {
    Context::from_pairs(pairs.into_iter().map(|(k, v)| (k.to_owned(), v))).map_err(|e| one_line(&e))
}

fn asked_with(parameters: &BTreeMap<String, String>) -> Result<Entity, String> {
    let text = |(k, v): (&String, &String)| (k.clone(), RestrictedExpression::new_string(v.clone()));
    Entity::new_with_tags(parameters_uid()?, [], [], parameters.iter().map(text)).map_err(|e| one_line(&e))
}

/// 1 for Monday to 7 for Sunday; the first of January 1970 was a Thursday.
fn weekday(time_unix_s: u64) -> u64 {
    (time_unix_s / 86_400 + 3) % 7 + 1
}

fn parameters_uid() -> Result<EntityUid, String> {
    uid("Parameters", "of this operation")
}

fn uid(kind: &str, id: &str) -> Result<EntityUid, String> {
    let kind = EntityTypeName::from_str(kind).map_err(|e| one_line(&e))?;
    Ok(EntityUid::from_type_name_and_id(kind, EntityId::new(id)))
}

fn long(n: u64) -> Result<RestrictedExpression, String> {
    let n = i64::try_from(n).map_err(|_| format!("{n} is too large a number"))?;
    Ok(RestrictedExpression::new_long(n))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_have_their_names() {
        assert_eq!(weekday(0), 4);
        assert_eq!(weekday(4 * 86_400 - 1), 7);
        assert_eq!(weekday(4 * 86_400), 1);
        assert_eq!(weekday(1_700_000_000), 2, "14 November 2023 was a Tuesday");
    }
}
